"""Comparison of a training with its linear-probe baseline, and its causes: each is planted and found."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL, call

from dinoseg.autotune import probe_baseline, probe_comparison
from dinoseg.autotune.probe_baseline import ProbeComparison, TrainedRun, compare, score_linear_probe
from dinoseg.config.nodes import instantiate
from dinoseg.experiment.builder import Builder
from dinoseg.inference.whole import Whole
from dinoseg.models.heads.linear import LinearHead
from dinoseg.tasks.probing.probe import Probe
from dinoseg.training.validation import evaluate
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

WORDS = (*SMALL, "adapter=frozen", "head=linear", "data.augment.color.hue=0", "data.augment.scale=[1,1]")


def write_blocks(root, train=8, val=3, label=lambda blocks: blocks % 100 > 50):
    """Write images of blocks of 8 x 8 px, whose classes are a function of their grey."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            blocks = draw.choice([20, 90, 160, 240], (4, 6)).astype(np.uint8)
            grey, mask = (np.kron(each, np.ones((8, 8))) for each in (blocks, label(blocks)))
            write_png(root / split / "images" / f"{number}.png", np.repeat(grey[..., None], 3, 2).astype(np.uint8))
            write_png(root / split / "masks" / f"{number}.png", mask.astype(np.uint8))


def trained(cfg, **given):
    """Return an untrained model of a config as a finished run."""
    engine = instantiate(cfg.engine)
    task = Builder(cfg).task()
    task.open(engine)
    parts = {
        "backbone": Builder(cfg).backbone,
        "loss": partial(Builder(cfg).loss, task.labelled),
        "optimizer": Builder(cfg).optimizer,
        "is_supervised": True,
        "crop": tuple(cfg.resolution.crop),
        "clip": cfg.trainer.clip,
        "cache_dir": cfg.cache_dir,
        "group": cfg.data.group,
    }
    return TrainedRun(engine.place(Builder(cfg).model()), engine, task.data_module, **{**parts, **given})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    where = tmp_path_factory.mktemp("probe")
    write_blocks(where / "data")
    return where


@pytest.fixture(scope="module")
def known():
    """Keep by their words what models were held once."""
    return {}


@pytest.fixture
def held(world, compose, monkeypatch, known):
    """Return a function that holds an untrained model of a config against its closed form."""
    monkeypatch.setattr(probe_baseline, "_affordable", lambda *_: (64, True))

    def hold(*words, anew=False):
        if anew:
            return hold_anew(*words)
        if words not in known:
            known[words] = hold_anew(*words)
        return deepcopy(known[words])

    def hold_anew(*words):
        cfg = compose(*WORDS, f"data.root={world}/data", f"cache_dir={world}/cache", *words)
        found = compare(trained(cfg), seconds=9.0)
        assert isinstance(found, ProbeComparison)
        return found

    return hold


def test_the_probe_of_separable_classes_is_good_and_an_untrained_model_is_below(held):
    found = held()
    assert found.probe["miou"] > 0.8 and found.is_below and found.scores["miou"] < 0.7
    assert (len(found.train), len(found.val)) == (8, 3)
    assert not replace(found, scores=found.probe).is_below
    assert not replace(found, scores={"miou": found.probe["miou"] - 0.009}).is_below
    assert replace(found, scores={"miou": None}).is_below
    assert f"this run {found.scores['miou']:.4f} on the same 3 validation images" in found.summary


def test_nothing_is_compared_without_time_or_images(world, compose, monkeypatch):
    cfg = compose(*WORDS, f"data.root={world}/data", f"cache_dir={world}/cache")
    finished = trained(cfg)
    assert compare(finished, seconds=0.5) is None
    asked = []
    monkeypatch.setattr(probe_baseline, "_affordable", lambda *given: asked.append(given) or (1, False))
    assert compare(finished, seconds=9.0) is None
    (run, policy), (plain, whole), splits, _, seconds = asked[0]
    assert run is finished.model and policy is finished.data_module.policy is not None
    assert isinstance(plain.head, LinearHead) and whole is None
    assert (
        splits == (finished.data_module.train, finished.data_module.val) and 0 < seconds < 9.0
    )  # less what was built until then


def ways_of(found):
    return probe_baseline._ScoredModel(found.run.model, Whole()), probe_baseline._ScoredModel(found.plain)


def test_images_are_as_many_as_the_time_is_for(held, affordable=probe_baseline._affordable):
    found = held()
    splits = found.train, found.val
    slow = [affordable(*ways_of(found), splits, found.run.engine, seconds) for seconds in (0.0, -1.0, 1e9)]
    assert slow == [(slow[0][0], False), (slow[1][0], False), (64, True)] and slow[1][0] <= slow[0][0] <= 0
    assert [len(probe_baseline.evenly_spaced_subset(found.train, count)) for count in (1, 2, 5, 64)] == [1, 2, 5, 8]


def test_time_is_told_from_images_of_all_sizes(held, monkeypatch, affordable=probe_baseline._affordable):
    found, clock = held(), [0.0]
    train, val = [1, 8, 8, 8, 1, 8, 8], [2, 9, 16, 9, 2, 9, 16]  # seconds of each image: the first is small

    def scored(way, image, engine):
        data, place = image
        taken = data[place] * (1 if way.policy is None else 3)  # the run's head takes longer
        clock[0] += taken
        return taken

    monkeypatch.setattr(probe_baseline, "_score", scored)
    monkeypatch.setattr(probe_baseline.time, "perf_counter", lambda: clock[0])
    ways = ways_of(found)  # of the images 0, 2, 4 and 6 are looked at: 4.5 s each in train, 9 s in val
    looking, plain, run = 4 * 2 + 4 * (4.5 + 4 * 9), (4.5 + 9) / 2, 3 * 9
    monkeypatch.setattr(probe_baseline, "_TIMING", 1.0)  # all that are looked at
    assert affordable(*ways, (train, val), found.run.engine, looking + (run + 3 * plain) * 20.95) == (20, False)
    assert affordable(*ways, (train, val), found.run.engine, looking + (run + 4 * 3 * plain) * 20.95) == (20, True)
    assert affordable(*ways, (train, val), found.run.engine, looking + (run + 4 * 3 * plain) * 16.5) == (16, True)
    assert affordable(*ways, (train, val[:1]), found.run.engine, 4 * 2 + 4 * 4.5 + 4 * 2 + 9000) == (64, True)
    clock[0] = 0
    monkeypatch.setattr(probe_baseline, "_TIMING", 0.1)
    affordable(*ways, (train, val), found.run.engine, 5)
    assert clock[0] == 4 * 2 + 1 + 4 * 2  # no longer than it is for: one image of each
    clock[0] = 0
    affordable(*ways, (train, val), found.run.engine, 100)
    assert clock[0] == 4 * 2 + 2 * (1 + 4 * 2)  # of the images 0 and 4, far apart, and that is enough


def test_an_image_is_timed_as_it_is_scored_and_no_rank_waited_for(held, monkeypatch):
    found = held()
    asked, modes = [], []

    class Recorded(Whole):
        def bands(self, model, *given, **named):
            asked.append(model)
            modes.append((model.training, torch.is_grad_enabled()))
            return super().bands(model, *given, **named)

    monkeypatch.setattr(type(found.run.engine), "sum", pytest.fail)
    found.run.model.train()
    assert (
        probe_baseline._score(
            probe_baseline._ScoredModel(found.run.model, Recorded()), (found.val, 1), found.run.engine
        )
        > 0
    )
    assert asked == [found.run.model] and modes == [(False, False)] and found.run.model.training
    clock, read = [0.0], type(found.val).__getitem__
    monkeypatch.setattr(probe_baseline.time, "perf_counter", lambda: clock[0])
    slow = lambda data, place: clock.__setitem__(0, clock[0] + 7) or read(data, place)  # noqa: E731
    monkeypatch.setattr(type(found.val), "__getitem__", slow)
    assert (
        probe_baseline._score(probe_baseline._ScoredModel(found.plain), (found.val, 1), found.run.engine) == 7
    )  # reading counts


def test_other_colours_are_as_many_as_time_is_told_for():
    assert len(probe_comparison.COLOURS) - 1 == probe_baseline._COLOURS


def test_a_class_that_training_lacks_is_named_with_what_it_costs(held, world, tmp_path):
    found = held()
    assert probe_comparison.absent_classes(found) is None
    masks = sorted((world / "data/val/masks").iterdir())
    assert masks
    rows = [{"id": 0, "iou": 0.8, "pixels": 5}, {"id": 1, "iou": 0.0, "pixels": 5}]
    gone = replace(found, scores={"miou": 0.4, "classes": rows})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_comparison, "class_counts", lambda *_: np.array([7, 0]))
        assert "No training mask has a pixel of bright, but validation masks do" in probe_comparison.absent_classes(
            gone
        )
        assert "mIoU of the other classes: 0.8000" in probe_comparison.absent_classes(gone)
        unseen = [rows[0], {"id": 1, "iou": None, "pixels": 0}]  # nor is it seen where the run is validated
        assert probe_comparison.absent_classes(replace(found, scores={"miou": 0.8, "classes": unseen})) is None
        patch.setattr(probe_comparison, "class_counts", lambda *_: np.array([7, 1]))
        assert probe_comparison.absent_classes(gone) is None


def test_colours_of_other_weights_are_tried_and_put_back(held, monkeypatch):
    found = held()
    own = found.plain.backbone.mean.clone(), found.plain.backbone.std.clone()
    assert probe_comparison.other_colours(found) is None or "normalisation" in probe_comparison.other_colours(found)
    seen = []

    def of_colours(run, plain, *_):
        seen.append(plain.backbone.mean.flatten().tolist())
        return {"miou": 0.95 if plain.backbone.std.flatten()[0] == 1 else 0.3}

    monkeypatch.setattr(probe_comparison, "score_linear_probe", of_colours)
    said = probe_comparison.other_colours(replace(found, probe={"miou": 0.9}))
    assert (
        "The linear probe scores mIoU 0.9500 with another normalisation (none) and 0.9000 with that of this run" in said
    )
    assert "backbone.mean=[0.0,0.0,0.0] backbone.std=[1.0,1.0,1.0]" in said and len(seen) >= 3
    assert probe_comparison.other_colours(replace(found, probe={"miou": 0.935})) is None  # less than two points
    above = replace(found, probe={"miou": 0.9}, scores={"miou": 0.95})
    assert (
        probe_comparison.causes_of(above) == [said] and probe_comparison.causes_of(replace(above, has_time=False)) == []
    )
    assert probe_comparison.causes_of(replace(above, has_time=True, until=0.0)) == []  # its time is spent
    assert torch.equal(found.plain.backbone.mean, own[0]) and torch.equal(found.plain.backbone.std, own[1])


def test_a_crop_far_from_the_images_is_tried_by_windows(held, monkeypatch):
    near, far = held(), held("resolution.crop=[16,24]")
    asked = []

    def in_windows(model, data, engine, *, policy):
        asked.append(policy.size)
        return {"miou": 0.5}

    monkeypatch.setattr(probe_comparison, "evaluate", in_windows)
    assert probe_comparison.far_crop(near) is None and not asked
    below = replace(far, scores={"miou": 0.3})
    said = probe_comparison.far_crop(below)
    assert (
        asked == [(16, 24)]
        and "The model scores mIoU 0.5000 in windows of resolution.crop=[16,24] and 0.3000 without" in said
    )
    assert probe_comparison.far_crop(replace(far, scores={"miou": 0.495})) is None


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ("1e-3", "The learning rate is too low: the training loss falls from"),
        ("0.1", "Too few steps: the training loss"),
        ("2", "The learning rate is too high: the training loss falls from"),
    ],
)
def test_a_rate_that_does_not_learn_is_found_by_training_on(held, rate, said):
    found = held(f"optim.optimizer.lr={rate}", "data.batch_size=3")
    before = {name: value.clone() for name, value in found.run.model.state_dict().items()}
    assert said in probe_comparison.learning_rate(found)
    assert all(torch.equal(value, before[name]) for name, value in found.run.model.state_dict().items())


def test_a_model_that_knows_its_training_images_alone_is_told_apart(held, monkeypatch):
    found = held()
    monkeypatch.setattr(probe_comparison, "evaluate", lambda *_, **__: {"miou": 0.99})
    assert "Overfitting: the model scores mIoU 0.9900 on its training images" in probe_comparison.learning_rate(found)
    scored = []
    monkeypatch.setattr(
        probe_comparison, "score_linear_probe", lambda run, plain, *on: scored.append(on) or {"miou": 0.9}
    )
    probe_comparison.learning_rate(found)
    assert scored == [(found.train, found.train)]  # the closed form, too, on the images that it is solved from


def test_rates_are_tried_where_labels_alone_teach_and_told_where_they_clearly_help(held, monkeypatch):
    found, losses = held(), {1.0: 0.99}
    monkeypatch.setattr(probe_comparison, "evaluate", lambda *_, **__: {"miou": 0.1})
    monkeypatch.setattr(probe_comparison, "score_linear_probe", lambda *_: {"miou": 0.9})
    monkeypatch.setattr(
        probe_comparison, "_losses", lambda held: (1.0, dict.fromkeys(probe_comparison._FACTORS, 0.99) | losses)
    )
    assert probe_comparison.learning_rate(found) is None  # 1 % less is chance
    losses[1.0] = 0.9
    assert "Too few steps: the training loss falls from 1 to 0.9 " in probe_comparison.learning_rate(found)
    half = replace(found, run=replace(found.run, best_step=50, steps=100))
    assert "Too few steps" in probe_comparison.learning_rate(half)
    said = probe_comparison.learning_rate(
        replace(half, run=replace(half.run, best_step=49))
    )  # more steps have been tried
    assert (
        "The best score came after step 49 of 100: more steps made it worse" in said and "fewer trainer.steps" in said
    )

    assert probe_comparison.learning_rate(replace(found, run=replace(found.run, is_supervised=False))) is None


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(probe_baseline, "_MIN_SECONDS", 1e-9)
    monkeypatch.setattr(probe_baseline, "_affordable", lambda *_: (64, True))
    monkeypatch.setattr("dinoseg.autotune.probe_comparison._CAUSES", 1e9)  # two steps leave milliseconds for causes


@pytest.mark.heavy
def test_a_run_below_the_probe_is_reported_with_causes_and_one_above_is_not(world, quick, monkeypatch):
    words = (*WORDS, f"data.root={world}/data", "mode=train", "data.batch_size=3")
    low = call(world, *words, "optim.optimizer.lr=1e-4", "hydra.run.dir=LOW")
    assert low.status == 0 and "WARNING This run scores below the linear probe" in low.err, low.err
    record = json.loads((world / "LOW/floor.json").read_text())
    assert record["below"] and record["run_miou"] < record["floor_miou"] and record["causes"]
    assert f"linear probe: mIoU {record['floor_miou']:.4f}, solved from 8 training images" in low.out
    monkeypatch.setattr(probe_baseline, "BELOW", 0.3)  # in two steps its running means move, which costs it as much
    good = call(world, *words, "head.init=probe", "optim.optimizer.lr=1e-6", "hydra.run.dir=GOOD")
    record = json.loads((world / "GOOD/floor.json").read_text())
    assert (
        good.status == 0 and not record["below"] and not record["causes"] and "below the linear probe" not in good.err
    )
    off = call(world, *words, "mode.probe_baseline=0", "hydra.run.dir=OFF")
    assert off.status == 0 and "linear probe:" not in off.out and not (world / "OFF/floor.json").exists()
    bad = call(world, *words, "mode.probe_baseline=2", "hydra.run.dir=BAD")
    assert bad.status == 1 and "mode.probe_baseline=2" in bad.err


def test_what_goes_wrong_beside_a_finished_run_does_not_fail_it(world, quick, monkeypatch):
    words = (*WORDS, f"data.root={world}/data", "mode=train", "mode.metrics_only=true")
    for number, error in enumerate((UserError("nothing to solve"), torch.OutOfMemoryError("CUDA out of memory. x"))):
        with monkeypatch.context() as patch:
            patch.setattr("dinoseg.autotune.probe_comparison.causes_of", lambda held, error=error: next(_raised(error)))
            done = call(world, *words, f"hydra.run.dir=W{number}")
        assert done.status == 0 and "its comparison with the linear probe failed: " in done.err, done.err
        assert str(error).splitlines()[0] in done.err and not (world / f"W{number}/floor.json").exists()


def _raised(error):
    raise error
    yield


def test_a_run_that_has_gone_on_is_held_anew_by_all_of_its_time(world, quick, monkeypatch):
    words = (*WORDS, f"data.root={world}/data", "mode=train", "mode.metrics_only=true")
    assert call(world, *words, "hydra.run.dir=ON").status == 0
    path, rates = world / "ON/floor.json", []
    first = json.loads(path.read_text())
    path.write_text(json.dumps({**first, "run_miou": 9}))

    def asked(*_, seconds):
        rates.append(seconds)

    monkeypatch.setattr("dinoseg.autotune.probe_comparison.compare", asked)
    monkeypatch.setattr("dinoseg.training.cost.median", lambda _: 2 / 500)  # images a second: 1,000 s for two steps
    again = call(world, *words, "resume=ON")
    assert again.status == 0 and "already done 2 steps" in again.err, again.err
    assert rates == [pytest.approx(0.03 * 1000)] and not path.exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_is_compared_if_no_image_is_labelled(held, split, monkeypatch):
    found = held()
    counts = {len(found.train): np.array([0, 3]), len(found.val): np.array([5, 5])}
    counts[len(getattr(found, split))] = np.array([0, 0])
    monkeypatch.setattr(probe_baseline, "class_counts", lambda data, _: counts[len(data)])
    assert compare(found.run, seconds=9.0) is None


def test_the_closed_form_is_that_of_the_probe(held):
    found = held()
    again = score_linear_probe(found.run, found.plain, found.train, found.val)
    assert again == found.probe
    wide = score_linear_probe(found.run, found.plain, found.train, found.train)
    assert wide["pixels"] == 8 * 32 * 48


def test_the_probe_is_solved_and_scored_as_the_run_says(held, monkeypatch):
    asked = {}

    def probe(plain, train, counts, engine, places, grid):
        asked.update(places=places["baseline"], group=grid.group, held_out=grid.held_out)
        return Probe(plain, train, counts, engine, places, grid)

    def scored(model, data, engine, *, policy):
        asked["policy"] = policy
        return evaluate(model, data, engine, policy=policy)

    monkeypatch.setattr(probe_baseline, "Probe", probe)
    monkeypatch.setattr(probe_baseline, "evaluate", scored)
    words = ("backbone.layers=[0,1]", "data.group='^(.)'", "inference=windows", "inference.size=16")
    found = held(*words, anew=True)
    said = {"places": [0, 1], "group": "^(.)", "held_out": 0.2, "policy": found.run.data_module.policy}
    assert asked == said and found.run.data_module.policy is not None
    monkeypatch.setattr(probe_baseline, "_WIDEST", 47)  # of two maps of 24
    held("backbone.layers=[0,1]", anew=True)
    assert asked["places"] == [1] and asked["group"] != "^(.)"


def test_nothing_is_compared_with_sharded_weights(held):
    found = held()
    engine = SimpleNamespace(sharded=True)  # which is asked nothing else: its ranks have parted
    assert compare(replace(found.run, engine=engine), seconds=9.0) is None
