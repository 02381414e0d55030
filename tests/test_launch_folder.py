"""Where a run that uses a checkpoint puts its results: below the checkpoint's recipe."""

import importlib
from pathlib import Path

import pytest
from command_line import SMALL, call, write_data
from omegaconf import OmegaConf

from dinoseg import launch
from dinoseg.launch import _below_recipe

NAMED = Path("outputs/base/eval_2026-01-02_03-04-05")


def test_an_evaluation_lies_below_its_recipe(tmp_path):
    write_data(tmp_path / "data")
    words = ("mode=train", "hparam=camvid", *SMALL, "mode.metrics_only=true")
    done = call(tmp_path, *words, "hydra.run.dir=run")
    assert done.status == 0, done.err
    for mode, more in (("eval", ("mode.metrics_only=true",)), ("predict", ("input=data/val/images",))):
        done = call(tmp_path, f"mode={mode}", "resume=run", "engine=cpu", "engine.workers=0", *more)
        assert done.status == 0, done.err
        assert len(list(tmp_path.glob(f"outputs/camvid/{mode}_*"))) == 1
    assert [path.name for path in (tmp_path / "outputs").iterdir() if path.name[0] != "."] == ["camvid"]


@pytest.mark.parametrize("recipe", ["../../elsewhere", "/tmp", "a/b", "..", "", 3, None])
def test_a_name_that_is_none_moves_nothing(recipe):
    assert _below_recipe(NAMED, "base", recipe) == NAMED


def test_a_folder_that_the_user_named_stays():
    for folder in (Path("mine"), Path("outputs/base/mine"), NAMED / "0"):
        assert _below_recipe(folder, "base", "person") == folder
    assert _below_recipe(NAMED, "base", "person") == Path("outputs/person") / NAMED.name


def test_a_process_that_knows_the_callback_alone_can_name_a_jobs_folder():
    OmegaConf.clear_resolver("recipe_name")  # as in a process that joblib or Slurm has started
    importlib.reload(launch)
    cfg = OmegaConf.create({"dir": "outputs/${recipe_name:${choice}}", "choice": "sarrarp/lora"})
    assert cfg.dir == "outputs/sarrarp_lora"
