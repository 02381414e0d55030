"""Parts from a package and a config folder outside the repository: those of docs/extending.md, and other trackers."""

import importlib
import json
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SLOTS, SMALL, call, succeed, write_data
from docs_pages import OURS, ROOT, blocks, commands
from mistakes import assert_refused, refusals
from omegaconf import OmegaConf

from dinoseg import create_model, load
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.loggers import logger_factories
from dinoseg.modes.help import help_for
from dinoseg.report.log import RunLog, read_rows
from dinoseg.training import checkpoint
from dinoseg.utils.images import read_ids

PAGE = ROOT / "docs/extending.md"
COMMANDS = [line.removeprefix(OURS) for line in commands(PAGE) if line.startswith(OURS)]
MODEL = [word for word in SMALL if not word.startswith(("data=", "data.classes=", "data.root="))]
OPTIONS = {  # of docs/extending.md
    **{"backbone": "patches", "adapter": "biases", "head": "bottleneck", "loss": "poly", "metric": "rare"},
    **{"data": "discs", "trainer": "smooth", "tracker": "colour", "mode": "balance", "logger": "losses"},
}

TRACKER = """
import numpy as np
from dinoseg.extensions.tracking.tracker import Tracker

class ShiftTracker(Tracker):
    def __init__(self, model, *, shift, **options):
        super().__init__(**options)
        self.kind, self.shift, self.last = type(model).__name__, shift, None

    @property
    def settings(self):
        return {"kind": self.kind, "shift": self.shift, "batch_size": self.batch_size}

    def track_batch(self, frames, labels):
        return [self.next_mask(frame, mask) for frame, mask in zip(frames, labels)]

    def next_mask(self, frame, mask):
        first = np.eye(*frame.shape[:2], dtype=np.uint8) if mask is None and self.last is None else mask
        self.last = np.roll(self.last, self.shift, axis=1) if first is None else first
        return self.last.copy()

    def state(self):
        return {}

    def load(self, state):
        pass
"""
TRACKER_CONFIG = "_target_: my_parts.trackers.ShiftTracker\n_partial_: true\nshift: 1\n"


def write_package(folder, files, monkeypatch):
    """Write the files of a package and a config folder; yield the words that name the config folder."""
    monkeypatch.syspath_prepend(folder / "mine")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    yield ("--config-dir", str(folder / "mine/config"))
    for name in [name for name in sys.modules if name.startswith(("my_parts", "test_my_parts"))]:
        del sys.modules[name]


@pytest.fixture
def own(tmp_path, monkeypatch):
    files = {
        "mine/my_parts/trackers.py": TRACKER,
        "mine/config/tracker/mine.yaml": TRACKER_CONFIG,
        "mine/config/slots/mine.yaml": TRACKER_CONFIG,
        "mine/config/tracker/whole.yaml": TRACKER_CONFIG.replace("_partial_: true\n", ""),
        "mine/config/tracker/foreign.yaml": "_target_: types.SimpleNamespace\n",
    }
    yield from write_package(tmp_path, files, monkeypatch)


@pytest.fixture
def documented_parts(tmp_path, monkeypatch):
    """Write the files of docs/extending.md."""
    texts = [text for _, text in blocks(PAGE, "python|yaml")]
    yield from write_package(tmp_path, {text.split()[1]: text for text in texts}, monkeypatch)


def test_the_parts_of_the_docs_are_listed(documented_parts):
    listed, usual = help_for([*documented_parts, "--help"]), help_for(["--help"])
    for option in OPTIONS.values():
        assert f" {option}" in listed and f" {option}" not in usual
    keys = help_for([*documented_parts, "mode=balance", "--help"])
    assert keys.startswith("Keys of mode=balance") and "mode.split=train " in keys and "Its groups: data\n" in keys
    files = [text for _, text in blocks(PAGE, "python") if "/my_parts/" in text.split()[1]]
    assert max(sum(1 for line in text.splitlines() if line) for text in files) <= 22
    assert len(files) == len(OPTIONS) + 2  # a loss and a dataset with maps


@pytest.mark.parametrize("part", ["backbone", "head", "loss", "dataset"])
def test_the_parts_of_the_docs_keep_their_contracts(part, documented_parts):
    getattr(importlib.import_module("test_my_parts"), f"test_{part}")()


@pytest.mark.heavy
def test_the_commands_of_the_docs_use_one_part_of_each_kind(trained, tmp_path, documented_parts):
    def run(command, *words):
        """Run a command with a small model in the folder of the package."""
        given = {"trainer.steps=6000": "trainer.steps=4", "input=VIDEO": f"input={trained / 'clip'}"}
        given["labels=MASK"] = f"labels={trained / 'first.png'}"
        done = call(tmp_path, *(given.get(word, word) for word in shlex.split(command)), *words)
        assert done.status == 0 and "No effect here" not in done.err, done.err
        return done

    balance, train, evaluate, resume, track, own_backbone, boundary = COMMANDS
    assert "ground" in run(balance, "hydra.run.dir=BALANCE").out
    assert json.loads((tmp_path / "BALANCE/balance.json").read_text()).keys() == {"ground", "disc"}
    assert "tensorboard --logdir" in run(train, *MODEL, "mode.metrics_only=true", "trainer.log_every=1").out
    assert all("train/variation" in row for row in read_rows(tmp_path / "RUN/metrics.jsonl") if "train/loss" in row)
    saved = checkpoint.describe(tmp_path / "RUN/checkpoints/last.safetensors")
    chosen = {group: option for group, option in saved["choices"].items() if group in OPTIONS}
    assert chosen.pop("backbone") == "tiny" and chosen.pop("adapter") == "full"
    assert chosen == {group: OPTIONS[group] for group in ("head", "loss", "data", "trainer")} | {"metric": ["rare"]}
    assert "logger" not in saved["config"]
    machine = ("engine=cpu", "engine.workers=0")
    loggers = tmp_path / "mine/my_parts/loggers.py"
    text = loggers.read_text()
    loggers.unlink()  # evaluation needs no logger
    evaluated = run(evaluate, *machine)
    assert "mIoU" in evaluated.out and "\nrare " in evaluated.out
    refused = call(tmp_path, "mode=eval", "resume=RUN", *machine)
    assert refused.status == 1 and "data=discs is not an option on this machine" in refused.err
    path = f"hydra.searchpath=[file://{tmp_path}/mine/config]"
    assert call(tmp_path, path, "mode=eval", "resume=RUN", *machine).status == 0
    loggers.write_text(text)
    run(resume, *machine, "mode.metrics_only=true", "trainer.log_every=1")
    rows = [line.split(",") for line in (tmp_path / "RUN/losses.csv").read_text().split()]
    assert [name for name, _ in rows] == ["1", "2", "mIoU", "3", "4", "mIoU"]
    run(own_backbone, *machine, "trainer.steps=2", "hydra.run.dir=BACKBONE")
    own = load(tmp_path / "BACKBONE", device="cpu", config_dir=tmp_path / "mine/config")
    assert "patches, adapter=biases" in repr(own)
    run(track, "backbone=rgb", "engine=cpu", "hydra.run.dir=TRACK")
    masks = [read_ids(each) for each in sorted((tmp_path / "TRACK/masks").iterdir())]
    assert len(masks) == 7 and set(np.unique(masks)) == set(np.unique(read_ids(trained / "first.png")))


@pytest.mark.heavy
def test_boundary_loss_of_the_docs_resumes_exactly(trained, tmp_path, documented_parts):
    def run(folder, steps, *words):
        command = COMMANDS[-1].replace("BOUNDARY", folder)
        constant = ("optim.schedule.kind=constant", "optim.schedule.warmup=0", f"trainer.steps={steps}")
        small = (*MODEL, "trainer.log_every=1", "mode.metrics_only=true", *constant, *words)
        succeed(tmp_path, *shlex.split(command), *small)
        rows = [row for row in read_rows(tmp_path / folder / "metrics.jsonl") if "train/boundary" in row]
        return [[row[name] for name in ("train/loss", "train/ce", "train/boundary")] for row in rows]

    whole = run("WHOLE", 4)
    run("PARTS", 2)
    assert run("PARTS", 4, "resume=PARTS") == whole and len(whole) == 4
    assert any(boundary < 0 for *_, boundary in whole)
    options = ("data=distance_folder", "data.classes=[dark,bright]", f"data.root={trained / 'data'}")
    files = run("FILES", 2, *options, "data.cache=null")
    assert run("PACKED", 2, *options, "data.cache=packed") == files and len(files) == 2


def test_own_backbone_of_the_docs_takes_adapters_and_any_size(documented_parts, tmp_path):
    config_dir = documented_parts[1]
    model = create_model("patches", adapter="last_blocks", head="dpt", num_classes=2, config_dir=config_dir).eval()
    assert model(torch.rand(2, 3, 37, 50)).shape == (2, 2, 37, 50)
    model.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", device="cpu", precision="fp32", config_dir=config_dir)
    image = torch.rand(1, 3, 16, 24)
    assert torch.equal(loaded(image), model(image))
    refused = {"adapter": "lora", "num_classes": 2, "config_dir": config_dir}
    assert_refused(lambda: create_model("patches", **refused), "no linear layer", "last_blocks")


def trains_biases_alone(model):
    trained = [name for name, each in model.named_parameters() if each.requires_grad and "backbone" in name]
    return bool(trained) and all(name.endswith("bias") for name in trained)


@pytest.fixture
def train_biases(documented_parts, tmp_path):
    """Return a function that trains with adapter=biases for one step."""
    write_data(tmp_path / "data")
    words = [*documented_parts, *SMALL, "mode=train", "adapter=biases", "mode.metrics_only=true", "adapter.blocks=1"]
    return partial(call, tmp_path, *words, "trainer.steps=1", "mode.report=false")


def remove_learning_rate(folder):
    file = folder / "mine/config/adapter/biases.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("lr:")))


def test_own_adapter_of_the_docs_needs_a_learning_rate(documented_parts, train_biases, tmp_path):
    adapter = {"adapter": "biases", "adapter.blocks": 1}
    assert trains_biases_alone(create_model("tiny", num_classes=2, config_dir=documented_parts[1], **adapter))
    remove_learning_rate(tmp_path)
    refused = train_biases("hydra.run.dir=REFUSED")
    assert refused.status == 1 and "adapter=biases trains the backbone and has no learning rate" in refused.err


@pytest.mark.heavy
def test_own_adapter_of_the_docs_trains(documented_parts, train_biases, tmp_path):
    done = train_biases("adapter.lr=0.5", "hydra.run.dir=RUN")
    assert done.status == 0, done.err
    assert trains_biases_alone(load(tmp_path / "RUN", device="cpu", config_dir=documented_parts[1]))
    remove_learning_rate(tmp_path)
    assert train_biases("optim.optimizer.lr=0.1", "hydra.run.dir=ONE").status == 0


class NoLogger:
    def __init__(self, out_dir, *, start_step):
        pass


def make_logger(target, **node):
    node = OmegaConf.create({"logger": {"mine": {"_target_": target, **node}}})
    return lambda: RunLog(Path(), logger_factories(Builder(node)))


WHY = "logger.mine cannot be instantiated "
test_parts_that_cannot_be_used_are_named = refusals(
    {
        "no callable": (make_logger("types.SimpleNamespace"), WHY, "not a callable", "Let its"),
        "arguments lack": (make_logger("builtins.divmod"), WHY, "set `_partial_: true`"),
        "other arguments": (make_logger("builtins.divmod", _partial_=True), WHY, "inherits"),
        "no logger": (
            make_logger(f"{__name__}.NoLogger", _partial_=True),
            "logger.mine: ",
            "NoLogger object",
            " is not an object of dinoseg.report",
        ),
    }
)

TRACK = ("mode=track", "input=clip", "engine=cpu", "mode.batch_size=3")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("tracker=mine", "labels=first.png", "backbone=rgb"), "RgbBackbone"),
        pytest.param(("tracker=mine", "resume=segmenter"), "SegmentationModel", marks=pytest.mark.heavy),
        (("slots=mine", "resume=slots", "labels=first.png"), "SegmentationModel"),
    ],
)
def test_own_tracker_runs_with_a_backbone_and_a_trained_model(trained, own, tmp_path, words, kind):
    succeed(trained, *own, *TRACK, *words, f"{words[0].partition('=')[0]}.shift=2", f"hydra.run.dir={tmp_path}/out")
    settings = json.loads((tmp_path / "out/track.json").read_text())["settings"]
    assert settings == {"kind": kind, "shift": 2, "batch_size": 3}
    masks = [read_ids(path) for path in sorted((tmp_path / "out/masks").iterdir())]
    assert len(masks) == 7
    if "labels=first.png" in words:
        np.testing.assert_array_equal(masks[0], read_ids(trained / "first.png"))
    for number, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, np.roll(masks[0], 2 * number, axis=1))


def test_an_own_tracker_is_evaluated(trained, own, tmp_path):
    words = ("mode=eval", "data=movi", "data.root=movi", "backbone=rgb", "engine=cpu", "tracker=mine")
    done = call(trained, *own, *words, f"hydra.run.dir={tmp_path}/out")
    assert done.status == 0 and "FG-ARI" in done.out, done.err
    recorded = json.loads((tmp_path / "out/tracking.json").read_text())
    assert recorded["tracker"]["kind"] == "RgbBackbone" and recorded["given"] == "first"
    assert (tmp_path / "out/scores.json").is_file()


@pytest.mark.heavy
def test_an_own_tracker_of_slots_validates_a_training(trained, own, tmp_path):
    words = ("slots=mine", "trainer.steps=1", "trainer.val_every=1", "mode.metrics_only=true")
    succeed(trained, *own, *SLOTS, *words, f"hydra.run.dir={tmp_path}/out")
    assert json.loads((tmp_path / "out/evaluation/tracking.json").read_text())["tracker"]["shift"] == 1


REMEDY = (
    "Set its `_target_` to a class that inherits from dinoseg.extensions.tracking.tracker.Tracker, "
    "and `_partial_: true`"
)


def test_invalid_trackers_are_refused(trained, own):
    backbone = ("labels=first.png", "backbone=rgb")
    for words, *parts in (
        ((*backbone, "tracker=whole"), "tracker=whole cannot be instantiated (ShiftTracker.__init__() missing", REMEDY),
        ((*backbone, "tracker=foreign"), f"returns SimpleNamespace, which does not create trackers. {REMEDY}"),
        (("resume=segmenter", "tracker=mine", "mode.smoothing=0.3"), "mode.smoothing=0.3: tracker=mine takes no"),
    ):
        done = call(trained, *own, *TRACK, *words)
        assert done.status == 1 and all(part in done.err for part in parts) and "Traceback" not in done.err, done.err
