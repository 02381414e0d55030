from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import assert_refused
from tiny_parts import tiny_vit

from dinoseg.core.shapes import Sample
from dinoseg.extensions.probe.probe import SHARPNESS, Candidates, Grid, Probe, held_out
from dinoseg.extensions.probe.sums import LinearMap
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.validation import evaluate


class RandomOrder:
    """Images of several sizes, whose classes are their brightness; class 3 never occurs."""

    classes = ("dark", "grey", "bright", "absent")
    ignore_index = 255
    skipped = {}
    palette = ((0, 0, 0), (9, 9, 9), (99, 99, 99), (1, 2, 3))

    def __init__(self, count, seed=0):
        draw = np.random.default_rng(seed)
        sizes = [(24, 40), (17, 31), (8, 8)]
        self.images = [torch.from_numpy(draw.integers(0, 3, (h, w))) for h, w in (sizes[i % 3] for i in range(count))]
        self.names = [f"{number // 2}_{number}" for number in range(count)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        ids = self.images[index][::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1)
        ids = ids[: self.images[index].shape[0], : self.images[index].shape[1]].to(torch.uint8)
        mask = ids.clone()
        mask[0] = 255
        return Sample(image=(ids * 100).expand(3, -1, -1).contiguous(), mask=mask, name=self.names[index])

    def counts(self):
        masks = torch.cat([self[index]["mask"].flatten() for index in range(len(self))])
        return [int((masks == number).sum()) for number in range(4)]


def engine(**options):
    return Engine("cpu", "fp32", workers=0, **options)


def make_probe(data, *, readings=None, size=1):
    model = SegmentationModel(tiny_vit((0, 1)).requires_grad_(False), LinearHead(24, 2, 4))
    return Probe(model, data, data.counts(), engine(eval_batch_size=size), readings or {"0+1": [0, 1]}, Grid())


def test_head_started_from_the_probe_has_the_scores_of_the_probe():
    train, val = RandomOrder(9), RandomOrder(4, seed=1)
    probe = make_probe(train, readings={"1": [1], "0+1": [0, 1]})
    probe.fit()
    alone, together = probe.choose()
    probe.score([alone, together], val)
    assert together.scores["miou"] > 0.9 and together.scores["classes"][3]["iou"] is None
    together.start(probe.model.head, sharpened=True)
    scored = evaluate(probe.model, val, engine())
    assert scored == together.scores
    one = SegmentationModel(tiny_vit((1,)), LinearHead(24, 1, 4))
    alone.start(one.head)
    assert evaluate(one, val, engine()) == alone.scores


def test_batches_change_nothing_and_all_images_are_solved_from():
    train = RandomOrder(9)
    single, joined = make_probe(train), make_probe(train, size=3)
    for probe in (single, joined):
        probe.fit()
    (first,), (second,) = single.choose(), joined.choose()
    torch.testing.assert_close(first.affine, second.affine, rtol=1e-6, atol=1e-6)  # maps differ in the last place
    assert first.choice == second.choice
    total = single.sums["0+1"]
    assert total.gram[0, -1, -1] == pytest.approx(sum(train.counts()))
    assert total.cells[0, -1] == sum(-(-h // 8) * -(-w // 8) for h, w in (image.shape for image in train.images))


def test_one_image_is_summed_up_once_and_chooses_itself():
    probe = make_probe(RandomOrder(1))
    assert (probe.held_out, probe.rest) == ([0], [])
    probe.fit()
    (found,) = probe.choose()
    assert probe.sums["0+1"].gram[0, -1, -1] == pytest.approx(sum(probe.counts)) and found.choice.miou > 0.9


def test_groups_stay_on_one_side():
    names = [f"{group}_{number}" for group in "abc" for number in range(3)]
    assert len({names[index][0] for index in held_out(names, Grid(group="^(.)"))}) == 1
    assert len(held_out(names, Grid(group="^(.)"))) == 3
    assert len(held_out(names, Grid(group="_()"))) == len(held_out(names, Grid())) == 1  # one group: each for itself
    assert held_out(names, Grid(seed=1)) != held_out(names, Grid(seed=2))


def test_a_candidate_is_counted_as_its_upsampled_scores_are():
    torch.manual_seed(0)
    features = torch.randn(2, 5, 3, 4)
    mask = torch.randint(0, 4, (2, 20, 30))
    mask[mask == 3] = 255
    maps = [LinearMap(torch.randn(3, 5).double(), torch.randn(3).double()) for _ in range(4)]
    candidates = Candidates(maps, 255)
    candidates.add(features, mask, (0.9, 1.0))
    for number, (weight, bias) in enumerate(maps):
        head = LinearHead(5, 1, 3).eval()
        head.start(weight, bias, torch.zeros(5), torch.ones(5))
        scores = head.predict(head([features]), (20, 30), (0.9, 1.0))
        known = mask != 255
        predicted = scores.argmax(dim=1)[known]
        expected = torch.bincount(mask[known] * 3 + predicted, minlength=9).view(3, 3)
        assert torch.equal(candidates.counts[number], expected)
        for place, factor in enumerate(SHARPNESS):
            loss = F.cross_entropy(factor * scores, mask, ignore_index=255, reduction="sum")
            assert candidates.losses[number, place].item() == pytest.approx(loss.item(), rel=1e-4)
    best = candidates.best()
    assert best.number == max(range(4), key=lambda number: iou(candidates.counts[number]))
    assert best.sharpness == SHARPNESS[int(candidates.losses[best.number].argmin())]


def iou(counts):
    hit = counts.diagonal().double()
    return (hit / (counts.sum(0) + counts.sum(1) - hit)).mean().item()


class Ranked(Engine):
    """One of two ranks, each in a thread of this process."""

    rank = 0
    world_size = 2
    met = Barrier(2, timeout=600)
    given = [None, None]

    def __init__(self, rank):
        super().__init__("cpu", "fp32", workers=0)
        self.rank = rank

    def each(self, value):
        self.given[self.rank] = value
        self.met.wait()
        values = list(self.given)
        self.met.wait()
        return values

    def sum(self, tensor):
        return sum(self.each(tensor.clone()))

    def broadcast(self, value):
        return self.each(value)[0]


def test_two_ranks_find_the_same_as_one():
    train, val = RandomOrder(9), RandomOrder(5, seed=1)

    def run(probe):
        probe.fit()
        found = probe.choose()
        probe.score(found, val)
        return probe, found

    alone, expected = run(make_probe(train))
    probes = [make_probe(train) for _ in range(2)]
    for rank, probe in enumerate(probes):
        probe.engine = Ranked(rank)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(run, probes))
    for probe, found in results:
        for value, whole in zip(probe._parts(), alone._parts(), strict=True):
            torch.testing.assert_close(value, whole, rtol=1e-9, atol=1e-9)
        assert [(each.choice, each.scores) for each in found] == [(each.choice, each.scores) for each in expected]


def test_a_balance_beyond_all_numbers_is_refused():
    model = SegmentationModel(tiny_vit((1,)), LinearHead(24, 1, 4))
    act = partial(Probe, model, RandomOrder(2), [9, 90, 9, 0], engine(), {"1": [0]}, Grid(balances=(0.0, 5000.0)))
    assert_refused(act, "balances=[0.0, 5000.0]: the weight of the rarest class")
