"""Where a run that uses a checkpoint puts its results: below the checkpoint's recipe."""

import importlib
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
from checkpoint_files import save_progress
from command_line import SMALL, call, succeed, write_data
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.cli import hydra_setup, launch
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import run_description
from dinoseg.extensions.idd.files import prepare_command
from dinoseg.extensions.video import sarrarp
from dinoseg.runs.folder import record_new_folders
from dinoseg.runs.location import RunLocation, move_below_recipe
from dinoseg.training import checkpoint, rendezvous
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Interrupted

NAMED = Path("outputs/base/eval_2026-01-02_03-04-05")

QUIET = ("mode.metrics_only=true", "mode.report=false")
MACHINE = ("engine=cpu", "engine.workers=0", *QUIET)


@pytest.mark.heavy
def test_evaluation_folder_is_below_its_recipe(tmp_path):
    write_data(tmp_path / "data")
    succeed(tmp_path, "mode=train", "hparam=camvid", *SMALL, *QUIET, "hydra.run.dir=run")
    words = ("mode=eval", "resume=run", "seed=3", *MACHINE)
    assert "resumes with" not in succeed(tmp_path, *words).err
    assert len(list(tmp_path.glob("outputs/camvid/eval_*"))) == 1
    assert [path.name for path in (tmp_path / "outputs").iterdir() if path.name[0] != "."] == ["camvid"]
    named = "outputs/camvid/eval_2026-01-02_03-04-05"  # as of two that begin in one second
    for folder, is_reported in ((named, False), (f"{named}_mine", True)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.log").touch()
        (tmp_path / folder / "metrics.csv").touch()  # of a run that has done something
        log = succeed(tmp_path, *words, f"hydra.run.dir={folder}").err
        message = rf"{folder} holds another run: this one is written to \S*{folder}_2\n"
        assert bool(re.search(message, log)) == ("another run" in log) == is_reported, log
        assert (tmp_path / f"{folder}_2/scores.json").is_file()


def save_last_step(cfg, *, out_dir, **_):
    """Leave of a training what a resume reads: the checkpoint of its last step."""
    build = Builder(cfg)
    steps = cfg.trainer.steps
    progress = {"step": steps, "best": 0.5, "best_step": steps, "stale": 0, "validation_pending": False}
    description = run_description(build, build.labels) | {"progress": progress, "frozen": {}}
    checkpoint.write(out_dir / "checkpoints/last.safetensors", {}, description)


def test_occupied_folder_and_resumed_checkpoint_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr("dinoseg.modes.train.train", save_last_step)
    write_data(tmp_path / "data")
    words = ("mode=train", *SMALL, *QUIET, "resolution.crop=32", "data.on_error=stop", "trainer.steps=1")
    assert "another run" not in succeed(tmp_path, *words, "hydra.run.dir=run").err
    log = succeed(tmp_path, *words, "hydra.run.dir=run").err
    assert re.search(r"\S*run holds another run: this one is written to \S*run_2\n", log)
    logged = []
    listed = "resume=.*last.safetensors: resumes with (.*)"

    def resumes_with(*words):
        log = succeed(tmp_path, "mode=train", "resume=run", *words).err
        found = re.findall(rf"\d\d:\d\d:\d\d INFO {listed}", log)
        logged.extend(found)
        assert re.findall(listed, (tmp_path / "run/run.log").read_text()) == logged
        return found

    assert resumes_with(*words) == []  # all that is typed is as it was
    assert resumes_with("optim.optimizer.lr=0.5", "trainer.steps=2", "seed=0", "data.root=./data", *MACHINE) == [
        "optim.optimizer.lr=0.5 instead of null, trainer.steps=2 instead of 1"
    ]
    betas = "optim.optimizer.betas=[0.5,0.9]"
    assert resumes_with(betas, "data.on_error=skip", "inference=windows", "trainer.steps=3", *MACHINE) == [
        f"inference=windows instead of auto, {betas} instead of [0.9,0.999], data.on_error=skip instead of stop, "
        "trainer.steps=3 instead of 2"
    ]
    (tmp_path / "run").rename(tmp_path / "gone")
    assert "your runs are below outputs/." in call(tmp_path, "mode=eval", "resume=run", *MACHINE).err


@pytest.mark.parametrize("recipe", ["../../elsewhere", "/tmp", "a/b", "..", "", 3, None])
def test_invalid_recipe_name_does_not_change_the_folder(recipe):
    assert move_below_recipe(NAMED, "base", recipe) == NAMED


@pytest.mark.parametrize("folder", [Path("mine"), Path("outputs/base/mine"), NAMED / "0", Path(f"{NAMED}_mine")])
def test_folder_named_by_the_user_is_unchanged(folder):
    assert move_below_recipe(folder, "base", "person") == folder
    assert move_below_recipe(NAMED, "base", "person") == Path("outputs/person") / NAMED.name


def test_mode_resumes_only_in_its_own_folder(tmp_path):
    cfg = OmegaConf.create({"mode": {"resumes_with": "predict.json"}})

    def resumes_with(*names):
        folder = tmp_path / "-".join(names or ["none"])
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        return launch.resumes_in_folder(cfg, folder)

    assert resumes_with("run.log", "predict.json", "a.png") and resumes_with("run.log")
    assert not (resumes_with() or resumes_with("predict.json") or resumes_with("run.log", "a.png"))


def start(cfg, folder):
    return launch.launch(launch.Job(cfg, RunLocation(folder, folder.parent), []))


@pytest.fixture
def second_rank(monkeypatch):
    """Be the second of two ranks that torchrun has started, of a mode that returns its folder."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "run_ranks", lambda *_: pytest.fail("a rank starts ranks"))
    monkeypatch.setattr(launch, "run_mode", lambda cfg, folder: folder)
    monkeypatch.setattr(launch, "has_other_ranks", lambda: False)  # ranks that prepare the same by themselves
    mode = {"_target_": "a.mode", "_partial_": True, "devices": 2, "resume_from": "last"}
    given = {"resume": None, "choices": {"mode": "a", "hparam": "a"}}
    return OmegaConf.create({"mode": mode, "trainer": {}, **given})


def test_other_ranks_use_config_and_folder_of_the_first(second_rank, tmp_path, monkeypatch):
    mine, first = tmp_path / "mine", tmp_path / "first"
    shared = json.dumps([OmegaConf.to_yaml({"trainer": {"ids": {1: 0}}}), str(first), None])
    monkeypatch.setattr(launch, "has_other_ranks", lambda: True)
    monkeypatch.setattr(rendezvous, "share_from_rank0", lambda *_, **__: shared)
    monkeypatch.setattr("dinoseg.cli.shared.compose_shared", lambda shared, mine: OmegaConf.create(shared))
    monkeypatch.setattr(launch, "run_mode", lambda cfg, folder: (cfg.trainer, folder))
    second_rank.engine = {"rendezvous_timeout": 1, "rank_timeout": 1}
    record_new_folders(mine)
    mine.mkdir()  # Hydra has
    assert start(second_rank, mine) == ({"ids": {1: 0}}, first)
    assert not list(tmp_path.iterdir())  # other ranks write no files


def test_a_mode_of_one_device_refuses_several_ranks(second_rank, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "has_other_ranks", lambda: True)
    del second_rank.mode.devices
    assert_refused(lambda: start(second_rank, tmp_path / "new"), "mode=a uses one device", "several ranks")
    assert not (tmp_path / "new").exists()


def test_a_rank_of_torchrun_keeps_to_its_share_of_the_processors(second_rank, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    monkeypatch.setattr(launch, "run_mode", lambda *_: os.environ.pop("OMP_NUM_THREADS"))
    assert start(second_rank, tmp_path / "new") == "1"


def test_single_process_uses_the_default_threads_of_torch(second_rank, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name)
    second_rank.mode.devices = 1
    monkeypatch.setattr(launch, "run_mode", lambda *_: os.environ.get("OMP_NUM_THREADS"))
    assert start(second_rank, tmp_path / "new") is None


def test_only_the_first_rank_reports_saved_results(second_rank, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "run_mode", Mock(side_effect=KeyboardInterrupt))
    for rank, said in (("1", ""), ("0", "this run has saved nothing")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(Interrupted) as stopped:
            start(second_rank, tmp_path / "run")
        assert (stopped.value.note, stopped.value.status) == (said, 130)


def test_worker_process_can_resolve_the_config_of_a_job():
    OmegaConf.clear_resolver("dinoseg.len")  # as in a process that joblib or Slurm has started
    importlib.reload(hydra_setup)
    cfg = OmegaConf.create({"num_classes": "${dinoseg.len:${classes}}", "classes": ["background", "leaf"]})
    assert cfg.num_classes == 2


def test_out_of_memory_error_preserves_its_cause(second_rank, tmp_path, monkeypatch):
    error = MemoryError()
    monkeypatch.setattr(launch, "run_mode", Mock(side_effect=error))
    with pytest.raises(UserError, match="Out of memory") as raised:
        start(second_rank, tmp_path / "run")
    assert raised.value.__cause__ is error
    monkeypatch.setattr(launch, "run_mode", Mock(side_effect=RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes"):
        start(second_rank, tmp_path / "run")


def test_commands_that_are_printed_quote_blanks(tmp_path):
    cfg = OmegaConf.create({"mode": {"resume_from": "last"}})
    run = tmp_path / "a run"
    save_progress(run, step=3)
    note = launch._interrupt_note(cfg, run, RunLocation(run, tmp_path))
    assert f"holds step 3. To resume, add resume=auto or 'resume={run}' to" in note
    note = launch._interrupt_note(cfg, run, RunLocation(tmp_path / "a", tmp_path, is_given=True))  # which holds another
    assert f"To resume, add 'resume={run}' to" in note
    note = launch._interrupt_note(cfg, run, RunLocation(run, run.parent / "a b", in_sweep=True))
    assert f"add resume=auto 'hydra.sweep.dir={tmp_path}/a b' to" in note
    assert sarrarp.prepare_command(run).endswith(f" 'data.root={run}'")
    assert prepare_command(run, "level3Id").endswith(f" 'data.root={run}'")
