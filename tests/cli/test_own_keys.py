"""Keys that only the checkpoint's config has, set on the command line without its groups."""

import csv
import shutil

import pytest
from command_line import SMALL, call, link_all
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from dinoseg.cli import own_keys
from dinoseg.cli.typos import explain_errors
from dinoseg.config.composition import SHIPPED
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import run_description
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError


def with_checkpoint_keys(words):
    return own_keys.with_checkpoint_keys(words, [SHIPPED])


@pytest.fixture
def here(trained_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return link_all(trained_once, tmp_path)


def run(where, *arguments):
    done = call(where, *arguments, "engine=cpu", "engine.workers=0")
    assert done.status == 0, done.err
    return done


def config(where, folder):
    return OmegaConf.load(where / folder / "config/config.yaml")


def test_slots_take_another_number_and_source(here):
    words = ("head.num_slots=2", "head.mask_source=alpha", "data.view.scale.1=1.5", "resolution.scale=0.5")
    run(here, "mode=eval", "mode.metrics_only=true", "resume=slots", *words, "hydra.run.dir=out")
    made = config(here, "out")
    assert (made.head.num_slots, made.head.mask_source, made.head.slot_dim) == (2, "alpha", 16)
    assert made.data.view.scale == [1.0, 1.5] and made.backbone == config(here, "slots").backbone
    assert made.head.positions_grid == [4, 4]  # what its positions were learnt for, at whatever scale it sees now


def test_prediction_takes_keys_of_its_checkpoint(here):
    words = ("head.dropout=0.5", "data.augment.scale.0=0.8")
    run(here, "mode=predict", "input=data/val/images/0.png", "resume=segmenter", *words, "hydra.run.dir=out")
    made = config(here, "out")
    assert made.head.dropout == 0.5 and made.data.augment.scale == [0.8, 1.5]


def test_training_resumes_with_changed_values(here):
    shutil.copytree(here / "slots", here / "own")
    words = ("trainer.steps=5", "head.iterations=2", "data.clips.cut.length=3")
    run(here, "mode=train", "resume=own", *words, "mode.metrics_only=true", "engine.precision=fp32")
    made = checkpoint.describe(here / "own/checkpoints/last.safetensors")
    assert made["progress"]["step"] == 5 and made["choices"]["head"] == "slots"
    assert made["config"]["head"]["iterations"] == 2 and made["config"]["data"]["clips"]["cut"]["length"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resume=slots head.num_slot=4", "head.num_slot is not a key of the config. Did you mean head.num_slots?"),
        ("resume=slots head.num_slots=four", "num_slots=four is of type str"),
        (
            "resume=segmenter head.num_slots=3",
            "head.num_slots=3: the config lacks this key. Options that",
        ),
        ("resume=slots data.reader.masks.format=ids", "To add it anyway, give ++data.reader.masks.format="),
        ("resume=nowhere head.num_slots=3", "resume=nowhere: file or folder not found."),
        (
            "resume=slots data=folder data.splits.val=val",
            "data=folder lacks this key. Options that",
        ),
    ],
)
def test_key_unknown_to_config_and_checkpoint_is_a_typo(here, line, message):
    done = call(here, "mode=eval", "engine=cpu", *line.split())
    assert done.status == 1 and message in done.err and done.err.count("error: ") == 1, done.err
    assert "Traceback" not in done.err and not list(here.glob("outputs/**/scores.json"))


@pytest.mark.heavy
def test_a_sweep_goes_over_keys_of_the_checkpoint(here):
    words = ("mode=eval", "resume=slots", "head.num_slots=2,3", "mode.metrics_only=true", "hydra.sweep.dir=sweep")
    run(here, "-m", *words)
    with open(here / "sweep/sweep.csv", encoding="utf-8") as file:
        assert sorted((row["head.num_slots"], row["note"]) for row in csv.DictReader(file)) == [("2", ""), ("3", "")]
    assert [config(here, f"sweep/{job}").head.num_slots for job in range(2)] == [2, 3]


@pytest.mark.parametrize(
    ("line", "marked"),
    [
        ("mode=eval head.num_slots=2 resume=slots", {"head.num_slots=2"}),
        ("resume=slots slots.match=auto", {"slots.match=auto"}),
        ("resume=slots data=movi data.view.flip=0 head=slots", {"data.view.flip=0"}),
        ("-m mode=eval data.batch_size=9 resume='slots',segmenter", {"data.batch_size=9"}),
        ("-m mode=eval head.num_slots=2 resume=slots,segmenter", set()),  # which one of them lacks
        ("mode=eval head.num_slots=2", set()),
        ("mode=train head.num_slots=2 resume=auto", set()),
        ("mode=train head.num_slots=2 resume=null", set()),
        ("mode=eval resume=slots head=slots +head.num_slots=2 ++head.num_slots=3 ~head.num_slots", set()),
        ("mode=eval resume=slots data=videos data.view.flip=0", set()),
        ("mode=eval resume=slots engine=cpu tracker.short_side=96 mode.split=val resume a=[b", set()),
        ("resume=segmenter slots.match=auto", set()),
        ("resume=slots slots=lock_on slots.match=auto", set()),
    ],
)
def test_keys_that_all_named_checkpoints_have_are_theirs(here, line, marked):
    words = line.split()
    assert with_checkpoint_keys(words) == [f"++{word}" if word in marked else word for word in words]


def test_root_keys_of_a_trainer_are_those_of_its_checkpoint(here, compose):
    build = Builder(compose("mode=train", *SMALL, "trainer=distil", "teacher=segmenter"))
    progress = {"step": 1, "best": 0.5, "best_step": 1, "stale": 0, "validation_pending": False}
    description = run_description(build, build.labels) | {"progress": progress, "frozen": {}}
    checkpoint.write(here / "student.safetensors", {}, description)
    words = ["mode=train", "resume=student.safetensors", "teacher=other"]
    assert with_checkpoint_keys(words) == [*words[:2], "++teacher=other"]
    done = call(here, "mode=eval", "resume=student.safetensors", "teacher=other", "engine=cpu")
    assert done.status == 1 and "Options that have it: trainer=distil." in done.err, done.err


def test_job_messages_omit_added_plus_signs():
    error = InterpolationKeyError("absent")
    word = "++head.dropout='${absent}'"
    with pytest.raises(UserError) as raised, explain_errors(["mode=summary", word], [SHIPPED]):
        raise error
    assert str(raised.value).startswith("head.dropout='${absent}' is not a valid value, or refers to a key that does")
