"""A step over the same samples has the same gradient, however they lie in batches, parts of batches and ranks."""

from copy import deepcopy
from functools import partial
from threading import Barrier, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from config_files import options
from hydra import compose, initialize_config_dir
from torch import nn

from dinoseg.__main__ import CONFIGS
from dinoseg.config.resolvers import register_resolvers
from dinoseg.core.contracts import Loss
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.distillation.distil import DistilledLoss, Part, ScoredBatch
from dinoseg.extensions.distillation.loss import TeacherView
from dinoseg.extensions.slots.contract import SlotOutputs
from dinoseg.losses import mask_classification
from dinoseg.training import micro_batches
from dinoseg.training.engine import Engine
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.step import StepOutput, batch_loss

K = 3
SIZE = (9, 8)
IMAGES = 4
SLOTS = ("feature_reconstruction", "temporal_similarity", "video_similarity", "slot_contrast")
CE, FOCAL, LOVASZ = (
    f"{{_target_: dinoseg.losses.{file}, _partial_: true, ignore_index: 255"
    for file in ("cross_entropy.CrossEntropy", "focal.Focal", "lovasz.Lovasz")
)
OHEM = "{_target_: dinoseg.extensions.few_masks.ohem.OhemCrossEntropy, _partial_: true, threshold: 0.2, min_kept: 30}"
MASKS = "{_target_: dinoseg.losses.mask_classification.MaskClassification, _partial_: true, num_points: 9}"


def mixture(**terms):
    """Return the words for a sum of terms."""
    words = ["loss=ce_dice", "~loss.criterion.terms.ce", "~loss.criterion.terms.dice"]
    words += ["~loss.criterion.factors.ce", "~loss.criterion.factors.dice"]
    for number, (name, term) in enumerate(terms.items()):
        words += [f"+loss.criterion.terms.{name}={term}", f"+loss.criterion.factors.{name}={1 + number / 2}"]
    return words


CASES = {name: [f"loss={name}"] for name in options("loss")}
CASES |= {
    "lovasz per image": ["loss=lovasz", "loss.criterion.per_image=true"],
    "hardest": ["loss=cross_entropy", "loss.criterion.hard_fraction=0.3"],
    "ce, lovasz per image": ["loss=ce_lovasz", "loss.criterion.terms.lovasz.per_image=true"],
    "over all": ["loss=cross_entropy", "loss.criterion.average=all"],
    "focal over all": ["loss=focal", "loss.criterion.average=all"],
    "ce, focal over all": mixture(ce=CE + ", average: all}", focal=FOCAL + ", average: all}"),
    "ce, ce over all": mixture(one=CE + "}", two=CE + ", average: all}"),
    "masks, background": ["loss=mask_classification", "loss.criterion.ignored=background"],
    "ce, focal": mixture(ce=CE + "}", focal=FOCAL + "}"),
    "ce, hardest": mixture(ce=CE + "}", hard=CE + ", hard_fraction: 0.1}"),
    "masks, ce, lovasz per image": mixture(masks=MASKS, ce=CE + "}", lovasz=LOVASZ + ", per_image: true}"),
    "ce, ohem": mixture(ce=CE + "}", hard=OHEM),
    "ce twice": mixture(one=CE + ", label_smoothing: 0.2}", two=CE + "}"),
}
CASES["masks, background"].append("loss.criterion.interpolation=bilinear")
CASES["ohem"] += ["loss.criterion.min_kept=30", "loss.criterion.threshold=0.2"]
BATCHWISE = {"bce_dice", "dice", "tversky", "lovasz", "ce_dice", "ce_dice_cldice", "ce_lovasz", "slot_contrast"}
BATCHWISE |= {"ce, hardest", "ohem", "ce, ohem"}
SEVERAL = {"mask_classification", "bce_dice", "ce_dice", "ce_dice_cldice", "ce_lovasz"}  # divisors
SEVERAL |= {
    "ce, lovasz per image",
    "ce, hardest",
    "ce, ohem",
    "masks, ce, lovasz per image",
    "masks, background",
    "ce, ce over all",
}


def criterion(option, *words, **weights):
    """Return the loss of the words of a case; of the whole config nothing but the group `loss` is composed."""
    register_resolvers()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose(option.replace("=", "/"), [*words, "+data.ignore_index=255"])
    return Builder(cfg).criterion(**weights)


class Table(nn.Module):
    """Outputs for images by their number: what would be learnt of a model."""

    def __init__(self, shapes, make, *, rows):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.rows = nn.ParameterList(torch.randn(rows, *shape, dtype=torch.float64, generator=draw) for shape in shapes)
        self.make = make

    def forward(self, image):
        number = image.flatten(1)[:, 0].long()
        return self.make([row[number] for row in self.rows])


def of_pixels(rows):
    return Prediction(rows[0], SIZE, (1.0, 1.0), upsample, grid=rows[0])


def of_masks(rows):
    classes, masks, more_classes, more_masks = rows
    outputs = MaskOutputs(classes, masks, [MaskOutputs(more_classes, more_masks)])
    mixed = torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :K], masks.sigmoid())
    return Prediction(outputs, SIZE, (1.0, 1.0), lambda _, size, valid: upsample(mixed, size, valid))


def of_clips(rows):
    features, told, slots, similarity = rows
    outputs = SlotOutputs(features.detach(), [told], [], torch.zeros(0), slots, [0], similarity)
    return Prediction(outputs, SIZE, (1.0, 1.0), upsample)


def table(kind, rows=IMAGES):
    query = [(5, K + 1), (5, 3, 2)]
    shapes = {"pixels": [(K, 3, 2)], "masks": query * 2}
    shapes["clips"] = [(3, 4, 2, 2), (3, 4, 2, 2), (3, 2, 5), (2, 4, 2, 2)]
    make = {"pixels": of_pixels, "masks": of_masks, "clips": of_clips}
    return Table(shapes[kind], make[kind], rows=rows)


def samples(first=0, count=IMAGES):
    """Return images of 1, 2 and 3 classes with ever fewer labels, one of them without any."""
    masks = torch.randint(0, K, (count, *SIZE), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    for number, mask in enumerate(masks):
        mask.clamp_(max=number % K)
        mask[: 2 * number] = 255
    masks[1] = 255
    numbers = torch.arange(first, first + count).to(torch.uint8)[:, None, None, None].expand(-1, 3, *SIZE)
    return Batch(numbers.contiguous(), masks, [str(number) for number in range(count)])


def as_layers(batch):
    """Return a batch with a layer for each class; all hold the pixels of class 1."""
    ids = batch.mask[:, None]
    layers = ((ids == torch.arange(K)[:, None, None]) | (ids == 1)).to(torch.uint8)
    return Batch(batch.image, torch.where(ids == 255, ids, layers), batch.names)


class Ranks:
    """What ranks that run as threads exchange."""

    def __init__(self, world_size):
        self.world_size, self.barrier, self.given = world_size, Barrier(world_size, timeout=600), [None] * world_size

    def engine(self, rank):
        """Return the engine of a rank, as far as a step asks for it."""

        def add_up(value):
            self.given[rank] = value
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            self.barrier.wait()
            return total

        engine = SimpleNamespace(device=torch.device("cpu"), world_size=self.world_size, sum=add_up)
        engine.total = partial(Engine.total, engine)
        return engine


class Short(Loss):
    """A loss on a machine with too little memory for more than `most` samples."""

    def __init__(self, loss, most):
        super().__init__()
        self.most = most
        self.loss, self.num_divisors, self.divisors = loss, loss.num_divisors, loss.divisors

    def forward(self, prediction, batch):
        return self._check_size(batch)(prediction, batch)

    def step_loss(self, prediction, batch, divisors):
        return self._check_size(batch).step_loss(prediction, batch, divisors)

    def _check_size(self, batch):
        if len(batch.names) > self.most:
            raise RuntimeError("not enough memory")
        return self.loss


def of_rank(net, batches, loss, ranks, rank, done):
    """Go through batches as training does, and keep the sum of the loss and the weight to divide it by."""
    engine = ranks.engine(rank)
    output = StepOutput(engine.device, None)
    undo = partial(net.zero_grad, set_to_none=True)
    micro = MicroBatches(engine, loss, 1, len(batches), undo=undo)
    for batch in micro.split_step(iter(batches), output):
        with micro.retry_batch():
            batch = batch.to(engine.device)
            prediction = net(batch.image)
            part = batch_loss(loss, prediction, batch, micro.divisors, micro.num_batches)
            part.total.backward()
            output.add(part, prediction, batch)
    total, weight = engine.total(output.total, output.weight)
    done[rank] = torch.stack([total, weight])


def step(net, loss, shares):
    """Return loss and gradients of a step whose ranks have these batches."""
    ranks = Ranks(len(shares))
    done = [None] * len(shares)
    nets = [deepcopy(net) for _ in shares]
    given = enumerate(zip(nets, shares, strict=True))
    threads = [Thread(target=of_rank, args=(*each, loss, ranks, rank, done)) for rank, each in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total, weight = done[0].double()
    return total / weight, [sum(each) / weight for each in zip(*map(gradients, nets), strict=True)]


def gradients(net):
    return [row.grad for row in net.rows if row.grad is not None]


@pytest.fixture(autouse=True)
def one_set_of_points_and_no_garbage(monkeypatch):
    points = torch.rand(1, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(mask_classification, "random_points", lambda count, *_: points.expand(count, -1, -1))
    uncertain = lambda masks, *_, **__: points.expand(len(masks), -1, -1)  # noqa: E731
    monkeypatch.setattr(mask_classification, "uncertain_points", uncertain)
    # freeing memory for smaller parts of a batch takes most of a test's time
    monkeypatch.setattr(micro_batches.gc, "collect", lambda *_: 0)


def check(net, loss, whole, *, batchwise=False):
    """Compare the ways to go through a batch with its own loss and gradient."""
    images = whole.to(torch.device("cpu"))
    alone = deepcopy(net)
    value, _ = loss(alone(images.image), images)
    value.backward()
    halves = whole.split(2)
    count = len(whole.names)
    least = len(images.names) // count
    ways = {
        "one batch": (loss, [[whole]]),
        "accumulated": (loss, [whole.split(count)]),
        "too little memory": (Short(loss, least), [[whole]]),
        "two ranks": (loss, [[half] for half in halves]),
        "two ranks, accumulated": (loss, [half.split(count // 2) for half in halves]),
    }
    apart = {}
    for way, (through, shares) in ways.items():
        found, own = step(net, through, shares)
        largest = max(each.abs().max() for each in gradients(alone))
        errors = [(one - two).abs().max() / largest for one, two in zip(own, gradients(alone), strict=True)]
        apart[way] = max(*errors, abs(found - value.detach()) / abs(value.detach()))
    assert apart.pop("one batch") < 1e-6
    assert all((error < 1e-5) != batchwise for error in apart.values()), apart
    assert loss.sums_over_batch == batchwise


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_equal_or_the_loss_declares_otherwise(name):
    clips = name in SLOTS
    loss = criterion(*CASES[name], **({} if clips else {"class_weights": torch.tensor([0.3, 1.0, 2.5])}))
    net = table("clips" if clips else "masks" if "mask" in name else "pixels")
    check(net, loss, as_layers(samples()) if "layers" in loss.needs else samples(), batchwise=name in BATCHWISE)
    assert (loss.num_divisors > 1) == (name in SEVERAL)


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("name", ["ce", "ce, lovasz per image"])
def test_a_teacher_s_terms_are_joined_by_their_own_divisors(name, weight):
    own = criterion(*CASES.get(name, ["loss=cross_entropy"]), class_weights=torch.tensor([0.3, 1.0, 2.5]))
    scored = ScoredBatch([part(samples()), part(samples(IMAGES))])
    check(table("pixels", rows=2 * IMAGES), DistilledLoss(own, weight), scored)


def part(batch):
    """Return a batch with a teacher's scores, each view of which shows another share of its image."""
    scores = torch.randn(IMAGES, K, 3, 2, generator=torch.Generator().manual_seed(8))
    matrices = [np.array([[1.0, 0, number], [0, 1.0, 0], [0, 0, 1]]) for number in range(IMAGES)]
    seen = [TeacherView.of(own, (1.0, 1.0), where, SIZE) for own, where in zip(scores, matrices, strict=True)]
    return Part(batch, [partial(lambda each: each, each) for each in seen])
