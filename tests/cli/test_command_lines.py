"""Command lines that end before a job begins: each mistake in one message; flags, versions, completion and recipes."""

import platform
import subprocess

import pytest
import torch
from command_line import SMALL, call, write_data

import dinoseg
from dinoseg.checkpoints.past_runs import find_runs, plan_of
from dinoseg.cli.typos import check_words
from dinoseg.config.composition import SHIPPED
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.training import checkpoint

MISTAKES = {  # after mode=summary
    "-m hparam=glob(nothing*)": "hparam=glob(nothing*) is unknown. Choose from ade20k_m2f, ",
    "-m head=glob(m*) head.nonsense=1": "head.nonsense is not a key of the config.",
    "~hydra.run.dir": "~hydra.run.dir is not a valid value, or refers to a key that does not exist. Leave it out",
    "hydra.sweep.dir={}": "hydra.sweep.dir={} is not a valid value",
    "data=\u202etxt": "data=\\u202etxt is unknown. Choose from ",
    "-m mode=train head=linear,mlp --cfg job": "--cfg is for one run. Leave -m out",
    "-m head=[1],[2]": "head=[1] is a list, and head takes one option. Choose one of cnn, ",
    "-m mode=train metric=[nsd],[nsdd]": "metric=nsdd is unknown. Did you mean metric=nsd?",
    "-m mode=train metric=[nsd],[] metric.nsd.tolerance=3": "metric is not a key of all",
    "--config-dir own hparam=mine trainer.stpes=3": "trainer.stpes is not a key of the config. Did you mean trainer.st",
    "--config-dir own hparam=mien": "hparam=mien is unknown. Did you mean hparam=mine? Choose from ade20k_m2f, auto, b",
    "--config-dir own hparam=sarrarp/lora": "hparam=sarrarp/lora is unknown. Did you mean hparam=sarrarp_lora?",
    "--config-dir own hparam=mine resolution=3": "resolution=3: resolution is a group of keys.",
    # Hydra runs only the last values
    "-m seed=1,2 ++seed=3,4": "seed=1,2 and ++seed=3,4 set the same key",
    "-m seed=1,2 seed=5": "seed=1,2 and seed=5 set the same key",
    # equal runs would count as two seeds
    "-m seed=1,2,1 head=linear,mlp": "seed=1,2,1 gives a value twice",
    # shapes, before the input is searched
    "mode=predict input=nothing mode.shapes=[1]": "mode.shapes is a group of keys. Set one of them: mode.shapes.f",
    "mode=predict input=* mode.outputs=[coko]": "mode.outputs names coko: choose some of coco, ",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake_is_one_message_and_starts_no_sweep(tmp_path, line):
    path = tmp_path / "own/hparam/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ndefaults: [/hparam/idd_lite]\nseed: 3\n")
    done = call(tmp_path, *(() if "mode=" in line else ("mode=summary",)), *line.split())
    assert done.status == 1 and done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
    assert MISTAKES[line] in done.err
    assert "-m" not in line or [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("line", "option"),
    [("metric=[cldice] metric.nsd.tolerance=1", "nsd"), ("logger.wandb.project=x", "wandb")],
)
def test_key_of_an_option_that_is_not_listed_names_it(tmp_path, line, option):
    words = line.split()
    found = call(tmp_path, "mode=train", *words).err
    group = words[-1].partition(".")[0]
    explained = f"the config lacks this key. Options that have it: {group}=[{option}]. Choose one"
    assert found.startswith(f"error: {words[-1]}: {explained}"), found


@pytest.mark.parametrize("word", ["metric=[nsd],[boundary_iou,cldice]", "logger=[],[tensorboard]", "metric=nsd,[]"])
def test_lists_of_options_can_be_swept(word):
    check_words(["-m", "mode=train", word], [SHIPPED])


def test_flags_may_stand_between_words(tmp_path):
    done = call(tmp_path, "mode=summary", "--cfg", "job", "--package", "data", "data.batch_size=3")
    assert done.status == 0 and "batch_size: 3\n" in done.out, done.err


def test_version_is_printed_without_composing(tmp_path):
    done = call(tmp_path, "--version")
    assert done.status == 0 and not done.err and not list(tmp_path.iterdir())
    assert done.out.startswith(f"dinoseg {dinoseg.__version__}\ntorch {torch.__version__} (")
    assert "CUDA" in done.out and f"Python {platform.python_version()}" in done.out and "Hydra" not in done.out


@pytest.fixture
def suggest(tmp_path, monkeypatch):
    """Return a function that completes a line by the Tab key."""

    def complete(line):
        monkeypatch.setenv("COMP_LINE", line)
        done = call(tmp_path, "--shell-completion", "query=bash")
        assert done.status == 0, done.err
        return done.out.split()

    return complete


@pytest.mark.parametrize("group", ["head", "backbone", "data"])
def test_completion_hides_options_that_only_config_files_read(suggest, group):
    words = suggest(f"dinoseg {group}=")
    assert len(words) > 3 and not [word for word in words if not word.startswith(f"{group}=") or "=_" in word]
    assert suggest(f"dinoseg {group}=_") == []


def test_completion_suggests_modes_and_keys(suggest):
    assert suggest("dinoseg mode=tr") == ["mode=track", "mode=train"]
    assert suggest("dinoseg mode=train trainer.st") == ["trainer.steps="]


def test_completion_script_is_that_of_the_shell(tmp_path):
    script = call(tmp_path, "--shell-completion", "install=bash").out
    assert "complete -o nospace" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_run_folder_and_checkpoint_use_the_recipe_name(tmp_path, compose, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    words = ("mode=train", "hparam=idd_lite", *SMALL, "mode.metrics_only=true")
    done = call(tmp_path, *words)
    assert done.status == 0, done.err
    (run,) = (tmp_path / "outputs/idd_lite").iterdir()
    assert checkpoint.describe(run / "checkpoints/last.safetensors")["choices"]["hparam"] == "idd_lite"
    (found,) = find_runs(tmp_path / "outputs", 2)
    assert found.plan.settings == plan_of(config_description(Builder(compose(*words, "resume=auto")))).settings
    other = call(tmp_path, "mode=eval", "hparam=idd_lora", f"resume={run}", "mode.split=nonsense")
    assert "was trained with hparam=idd_lite" in other.err
