"""Recipe names: one spelling on the command line, in run folders and in checkpoints; recipes of the user's own."""

import pytest
from command_line import SMALL, call, write_data

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.past_runs import find_runs, plan_of
from dinoseg.experiment.recipe import config_description
from dinoseg.training import checkpoint

OWN = "# @package _global_\ndefaults: [/hparam/idd_lite]\nseed: 3\n"


@pytest.fixture
def own(tmp_path):
    """A folder of config groups with a recipe of the user's own."""
    path = tmp_path / "own/hparam/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(OWN)
    return tmp_path / "own"


def test_run_folder_and_checkpoint_use_the_recipe_name(tmp_path, compose, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    done = call(tmp_path, "mode=train", "hparam=idd_lite", *SMALL, "mode.metrics_only=true")
    assert done.status == 0, done.err
    (run,) = (tmp_path / "outputs/idd_lite").iterdir()
    last = run / "checkpoints/last.safetensors"
    assert checkpoint.describe(last)["choices"]["hparam"] == "idd_lite"
    again = compose("mode=train", "hparam=idd_lite", *SMALL, "mode.metrics_only=true", "resume=auto")
    (found,) = find_runs(tmp_path / "outputs", ())
    assert found.plan.settings == plan_of(config_description(Builder(again))).settings
    other = call(tmp_path, "mode=eval", "hparam=idd_lora", f"resume={run}", "mode.split=nonsense")
    assert "was trained with hparam=idd_lite" in other.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hparam=mine", "trainer.stpes=3"], "trainer.stpes is not a key of the config. Did you mean trainer.steps"),
        (["hparam=mien"], "Did you mean hparam=mine? Choose from ade20k_m2f, auto, base,"),
        (["hparam=sarrarp/lora"], "hparam=sarrarp/lora is unknown. Did you mean hparam=sarrarp_lora?"),
        (["hparam=mine", "resolution=3"], "error: resolution=3: resolution is a group of keys."),
    ],
)
def test_errors_are_reported_with_own_recipes_present(own, tmp_path, words, message):
    done = call(tmp_path, "--config-dir", own, "mode=summary", *words)
    assert done.status == 1 and message in done.err, done.err


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        (
            "mode.shapes=[1]",
            "mode.shapes=[1]: mode.shapes is a group of keys. Set one of them: mode.shapes.format|",
        ),
        ("mode.outputs={a:1}", "mode.outputs is a list. Write it in brackets: mode.outputs=[...]."),
        ("mode.outputs=[coko]", "mode.outputs names coko: choose some of coco, "),
    ],
)
def test_wrong_shape_is_refused_before_input_is_searched(tmp_path, word, wrong):
    assert wrong in call(tmp_path, "mode=predict", "input=nothing", word).err
