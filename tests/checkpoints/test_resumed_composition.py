"""A job with a checkpoint: which of its options and values come from the file, and which from the words."""

import json

import pytest
from command_line import SMALL
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.checkpoints.resume import compose_resumed
from dinoseg.config import composition
from dinoseg.config.composition import SHIPPED
from dinoseg.config.job import read_words
from dinoseg.config.plain import to_container
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.training.description import SAVED

DATA = ("data.root=.", "data.classes=[a,b]")
RESUMED = ("mode=eval", "resume=x")


@pytest.fixture(scope="module")
def describe(compose):
    """Return a function that returns the description of a training of some words, as read from a file."""
    return lambda *words: json.loads(json.dumps(config_description(Builder(compose("mode=train", *words)))))


@pytest.fixture
def resume(tmp_path):
    """Return a function that composes a job with a checkpoint from its description and words."""

    def compose_job(info, *words, folders=(), tell=False):
        options, values, _ = read_words(words, [SHIPPED, *folders])
        cfg = composition.compose(options, values, folders, later=SAVED).cfg
        return compose_resumed(cfg, words, tmp_path / "x", info, tell=tell)

    return compose_job


def test_prediction_with_slots_reads_no_training_of_them(describe, resume):
    info = describe("hparam=slots_clips", "data.root=.")
    cfg = resume(info, "mode=predict", "head.num_slots=3")
    assert (cfg.head.num_slots, cfg.choices.head, cfg.choices.trainer) == (3, "slots", "slots")
    assert {"trainer", "loss", "slots"} <= {*cfg.values_only} and cfg.slots == info["config"]["slots"]
    assert_refused(
        lambda: resume(info, "mode=predict", "slots.match=auto"), "mode=predict does not read the group slots"
    )


def test_other_data_bring_their_whole_group(describe, resume):
    info = describe(*DATA, "data.ignore_index=7", "data.batch_size=3")
    cfg = resume(info, *RESUMED, "data=binary", "data.root=other")
    assert (cfg.choices.data, cfg.data.root) == ("binary", "other") and cfg.choices.head == "linear"
    assert cfg.data.ignore_index == 255 and cfg.data.batch_size != 3
    assert_refused(
        lambda: resume(info, *RESUMED, "data=binary", "data.clips.cut.length=3"), "data=binary lacks this key"
    )


@pytest.mark.parametrize(
    ("words", "metrics"), [((), ["nsd"]), (("metric=[]",), []), (("metric=[cldice]",), ["cldice"])]
)
def test_typed_metrics_replace_those_of_the_run(describe, resume, words, metrics):
    cfg = resume(describe(*DATA, "metric=[nsd]", "metric.nsd.tolerance=3"), *RESUMED, *words)
    assert [*(cfg.get("metric") or ())] == metrics == [*cfg.choices.metric]
    assert "nsd" not in metrics or cfg.metric.nsd.tolerance == 3


@pytest.mark.parametrize(
    ("group", "option"), [("head", "mlp"), ("backbone", "timm"), ("hparam", "demo"), ("task", "multilabel")]
)
def test_another_option_of_the_model_is_refused(describe, resume, group, option):
    info = describe(*DATA)
    was = {"head": "linear", "backbone": "dinov2_vits14", "hparam": "base", "task": "semantic"}[group]
    assert resume(info, "mode=train", f"{group}={was}").choices[group] == was
    assert_refused(
        lambda: resume(info, "mode=train", f"{group}={option}"),
        f"{group}={option}: the checkpoint ",
        f"was trained with {group}={was}. Leave {group} out",
    )


def test_a_typed_length_replaces_stored_epochs(describe, resume, caplog):
    caplog.set_level("INFO")
    info = describe(*DATA, "trainer.epochs=5")
    assert resume(info, "mode=train").trainer.epochs == 5
    cfg = resume(info, "mode=train", "trainer.steps=7", tell=True)
    assert (cfg.trainer.steps, cfg.trainer.epochs) == (7, None)
    assert "resumes with trainer.steps=7 instead of 5000" in caplog.text


def test_typed_mappings_replace_stored_ones_and_keys_change_them(describe, resume):
    info = describe(*DATA, "loss.weights={a: 2, b: 3}", "data.augment.scale=[0.7,1.4]")
    assert resume(info, "mode=train", "loss.weights={a: 5}").loss.weights == {"a": 5}
    assert resume(info, "mode=train", "loss={weights: {a: 5}}").loss.weights == {"a": 5}
    assert resume(info, "mode=train", "++loss.weights={a: 5}").loss.weights == {"a": 5, "b": 3}
    assert resume(info, "mode=train", "loss.weights.a=5").loss.weights == {"a": 5, "b": 3}
    assert resume(info, "mode=train", "data.augment.scale.0=0.8").data.augment.scale == [0.8, 1.4]
    assert resume(info, "mode=train", "head={lr: 0.5}").head == {**resume(info, "mode=train").head, "lr": 0.5}


def test_stored_values_count_before_local_ones(describe, resume, compose, tmp_path):
    (tmp_path / "local").mkdir()
    local = {"data": {"root": "/local", "batch_size": 9}, "engine": {"workers": 3}, "head": {"layers": [-2]}}
    header = "# @package _global_\n"
    (tmp_path / "local/default.yaml").write_text(header + OmegaConf.to_yaml(OmegaConf.create(local)), encoding="utf-8")
    info = describe(*DATA, "data.batch_size=2")
    merged = resume(info, *RESUMED, folders=[tmp_path])
    assert (merged.data.batch_size, merged.engine.workers) == (2, 3)
    assert merged.head == to_container(compose("mode=eval"))["head"]
    typed = resume(info, *RESUMED, "data=binary", folders=[tmp_path])
    assert (typed.data.batch_size, typed.data.root) == (9, "/local")


def test_only_a_new_run_takes_init_from_a_config_file(describe, resume, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/default.yaml").write_text("# @package _global_\ninit: another\n", encoding="utf-8")
    assert resume(describe(*DATA), "mode=train", folders=[tmp_path]).init is None


def test_options_of_a_missing_folder_are_named(describe, resume):
    info = describe(*DATA)
    info["choices"]["head"] = "mine"
    assert_refused(lambda: resume(info, *RESUMED), "head=mine is not an option on this machine", "--config-dir")


def test_records_of_changes_have_stored_and_typed_values(describe, resume, caplog):
    caplog.set_level("INFO")
    info = describe(*SMALL, "metric=[nsd]")
    resume(info, "mode=train", "data.batch_size=4", "engine.workers=0", "metric=[]", "seed=0", tell=True)
    (line,) = [record.message for record in caplog.records if "resumes with" in record.message]
    assert line.endswith("resumes with metric=[] instead of [nsd], data.batch_size=4 instead of 2")


def test_the_command_that_added_a_key_resumes_its_run(describe, resume):
    added = "+backbone.arch.drop_path_rate"
    tiny = ("backbone=tiny",)
    info = describe(*DATA, *tiny, f"{added}=0.1")
    assert resume(info, "mode=train", *tiny).backbone.arch.drop_path_rate == 0.1
    for value in (0.1, 0.3):
        assert resume(info, "mode=train", *tiny, f"{added}={value}").backbone.arch.drop_path_rate == value
