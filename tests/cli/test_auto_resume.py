"""Which run `resume=auto` resumes, by the command line: given folders, newest runs and sweeps."""

import errno
import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMALL, call, write_data
from mistakes import assert_refused

import dinoseg
from dinoseg.cli import resuming
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import run_description
from dinoseg.methods.images import ImageTraining
from dinoseg.runs.folder import RunFolder, command_line
from dinoseg.training import checkpoint
from dinoseg.training.end_record import write_end
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils.errors import UserError

QUIET = ("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "logger=[]")
TRAIN = ("mode=train", *SMALL, *QUIET, "trainer.save_every=1", "trainer.steps=3")
AUTO = (*TRAIN, "resume=auto")
LIMIT = "# @package _global_\ntrainer: {max_minutes: 30}\n"
FOLDER = "# @package _global_\nhydra: {run: {dir: mine}}\n"


def train_without_a_model(cfg, *, out_dir, metrics_only, pictures, report, init_head, choose_thresholds):
    """Write what a training leaves: the checkpoint of each step, and its end."""
    path = out_dir / "checkpoints/last.safetensors"
    build = Builder(cfg)
    described = run_description(build, build.labels) | {"frozen": {}}
    done = checkpoint.describe(Path(cfg.resume))["progress"]["step"] if cfg.resume else 0
    for step in range(done + 1, cfg.trainer.steps + 1):
        progress = {"step": step, "best": 0.5, "best_step": step, "stale": 0, "validation_pending": False}
        checkpoint.write(path, {}, described | {"progress": progress})
    write_end(out_dir, cfg.trainer.steps, {"miou": 0.5})
    return {"miou": 0.5}


def end(*_, **__):
    raise SystemExit(9)


@pytest.fixture
def here(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Leave out of trainings all but their checkpoints: what is tested is the choice of a run."""
    monkeypatch.setattr("dinoseg.modes.train.train", train_without_a_model)


@pytest.fixture
def interrupt(here, monkeypatch):
    """Return a function that trains until a signal stops the run after two steps; real ones end a step first."""

    def stop_training(*words, saves=2):
        write = checkpoint.write
        written = []

        def write_twice(path, *given):
            write(path, *given)
            written.extend(["last"] * (path.stem == "last"))
            if len(written) == saves:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "write", write_twice)
            done = call(here, *words)
        assert done.status == 143, done.err
        return done

    return stop_training


def run_checked(here, *words):
    done = call(here, *words)
    assert done.status == 0, done.err
    return done


def info_of(run):
    return checkpoint.describe(run / "checkpoints/last.safetensors")


def step_of(run):
    return info_of(run)["progress"]["step"]


def runs(here):
    return sorted(here.glob("outputs/*/train_*"))


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_local(here, text):
    """Write a local config, and return the words that use it."""
    (here / "own/local").mkdir(parents=True)
    (here / "own/local/default.yaml").write_text(text)
    return "--config-dir", "own"


def test_given_folder_resumes_its_checkpoint(quick, here, interrupt):
    interrupt(*AUTO, "hydra.run.dir=mine")
    assert step_of(here / "mine") == 2
    run_checked(here, *AUTO, "hydra.run.dir=mine", "trainer.steps=4")
    assert step_of(here / "mine") == 4 and not (here / "mine_2").exists()


def test_given_folder_is_used_despite_earlier_runs(quick, here):
    run_checked(here, "-m", *TRAIN, "hydra.sweep.dir=outputs/base/sweep", "head=linear")
    before = files_of(here / "outputs/base/sweep")
    run_checked(here, *AUTO, "trainer.steps=4", "hydra.run.dir=outputs/base/new")
    assert step_of(here / "outputs/base/new") == 4 and files_of(here / "outputs/base/sweep") == before


def test_given_folder_without_checkpoint_is_started_in(quick, here):
    (here / "mine").mkdir()
    (here / "mine/run.log").write_text("killed before its first save\n")
    done = run_checked(here, *AUTO, "hydra.run.dir=mine")
    assert step_of(here / "mine") == 3 and not (here / "mine_2").exists()
    assert f"{here / 'mine'} holds no checkpoint: the training starts there." in done.err


def test_start_in_a_given_folder_replaces_a_dead_runs_config(quick, here, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", end)
        assert call(here, *AUTO, "hydra.run.dir=mine", "head=mlp").status == 9
    assert "head=mlp" in command_line(here / "mine")
    (here / "mine/config/notes").write_text("of the user")
    run_checked(here, *AUTO, "hydra.run.dir=mine")
    assert "head=mlp" not in command_line(here / "mine") and [*here.glob("mine/config*")] == [here / "mine/config"]
    assert (here / "mine/config/notes").exists()


def test_given_folder_may_hold_files_of_others(quick, here):
    (here / "mine").mkdir()
    (here / "mine/slurm-71.out").write_text("of a scheduler\n")
    run_checked(here, *AUTO, "hydra.run.dir=mine")
    assert step_of(here / "mine") == 3 and (here / "mine/slurm-71.out").read_text() == "of a scheduler\n"


def test_given_folder_of_another_recipe_or_of_a_finished_run(quick, here):
    run_checked(here, *TRAIN, "hydra.run.dir=mine")
    before = files_of(here / "mine")
    done = call(here, *AUTO, "hydra.run.dir=mine", "head=mlp", "trainer.clip=7")
    assert done.status == 1 and "head" in done.err and "trainer.clip" in done.err and "data.root" not in done.err
    assert "target" not in done.err  # options are named, not their classes
    done = run_checked(here, *AUTO, "hydra.run.dir=mine")
    (line,) = done.err.splitlines()
    assert "resume=mine" in line.replace(f"{here}/", "") and "trainer.steps" in line and not done.out
    assert files_of(here / "mine") == before


def test_locked_given_folder_is_an_error(here, monkeypatch):
    monkeypatch.setattr(resuming, "PATIENCE", 0)
    monkeypatch.setattr("dinoseg.runs.folder.locks.acquire", lambda path, wait: None)
    done = call(here, *AUTO, "hydra.run.dir=mine")
    assert done.status == 1 and "mine" in done.err and "another process" in done.err.lower()
    assert "choose another run folder" in done.err


def test_script_that_names_its_folder_resumes_it_alone(quick, here, interrupt):
    """Two tasks of an array, which train the same recipe: each is killed, queued again, and at last submitted again."""
    tasks = [f"hydra.run.dir=outputs/job_{task}" for task in (0, 1)]
    for folder in tasks:
        interrupt(*AUTO, folder)
    folders = [here / "outputs/job_0", here / "outputs/job_1"]
    for folder, steps in zip(tasks, ([3, 2], [3, 3]), strict=True):
        run_checked(here, *AUTO, folder)
        assert [step_of(run) for run in folders] == steps
    done = run_checked(here, *AUTO, tasks[0])
    assert (
        "is finished" in done.err and not (here / "outputs/base").exists() and len([*folders[0].glob("config*")]) == 2
    )


def test_finished_run_without_its_last_checkpoint_is_reported(here):
    run_checked(here, *AUTO, "hydra.run.dir=mine")
    (here / "mine/checkpoints/last.safetensors").unlink()
    before = files_of(here / "mine")
    done = run_checked(here, *AUTO, "hydra.run.dir=mine")
    assert "mine is finished at step 3" in done.err and files_of(here / "mine") == before
    assert call(here, *AUTO, "hydra.run.dir=mine", "seed=1").status == 1
    done = call(here, *AUTO, "hydra.run.dir=mine", "trainer.steps=4")
    assert done.status == 1 and "mine/checkpoints/last.safetensors" in done.err, done.err


def test_damaged_checkpoint_in_given_folder_is_an_error(quick, here, interrupt):
    interrupt(*AUTO, "hydra.run.dir=mine")
    (here / "mine/checkpoints/last.safetensors").write_bytes(b"cut")
    before = files_of(here / "mine")
    done = call(here, *AUTO, "hydra.run.dir=mine")
    assert done.status == 1 and "mine/checkpoints/last.safetensors" in done.err and "remove the file" in done.err
    assert files_of(here / "mine") == before


def test_folder_of_a_sweep_is_refused_for_a_single_run(quick, here):
    run_checked(here, "-m", *TRAIN, "hydra.sweep.dir=swept")
    done = call(here, *AUTO, "hydra.run.dir=swept")
    assert (
        done.status == 1 and f"hydra.sweep.dir={here / 'swept'}" in done.err and not (here / "swept/run.log").exists()
    )


def test_local_config_gives_a_folder(quick, here):
    words = (*write_local(here, FOLDER), *AUTO)
    run_checked(here, *words)
    done = run_checked(here, *words)
    assert step_of(here / "mine") == 3 and "finished" in done.err and not (here / "mine_2").exists()


@pytest.mark.parametrize("dated", ["train_${now:%f}", "${now:%Y-%m-%d}/${now:%f}"])
def test_folder_named_by_the_time_is_not_given(quick, here, interrupt, dated):
    dated = f"hydra.run.dir=elsewhere/{dated}"
    interrupt(*AUTO, dated)
    run_checked(here, *AUTO, dated)
    (run,) = here.glob("elsewhere/**/checkpoints")
    assert step_of(run.parent) == 3


@pytest.mark.parametrize(("folder", "is_found"), [("outputs/base/mine", True), ("outputs/mine", False)])
def test_runs_of_the_recipe_alone_are_found_without_a_folder(quick, here, interrupt, folder, is_found):
    interrupt(*TRAIN, f"hydra.run.dir={folder}")
    run_checked(here, *AUTO)
    assert (step_of(here / folder), len(runs(here))) == ((3, 0) if is_found else (2, 1))


def test_newest_unfinished_run_of_equal_length_is_resumed(quick, here, interrupt):
    interrupt(*TRAIN)
    (run,) = runs(here)
    done = run_checked(here, *AUTO, "trainer.steps=4")
    assert step_of(run) == 2 and len(runs(here)) == 2
    assert f"no unfinished run of this recipe and length in {here / 'outputs/base'}: starting a new run" in done.err
    run_checked(here, *AUTO, "trainer.val_every=2", "trainer.patience=9")
    assert step_of(run) == 3 and len(runs(here)) == 2
    before = files_of(run)
    done = run_checked(here, *AUTO)
    assert len(runs(here)) == 3 and files_of(run) == before and "starting a new run" in done.err


def test_time_limit_of_a_config_file_outlives_resumes(quick, here, interrupt):
    words = (*write_local(here, LIMIT), *AUTO, "trainer.steps=9")
    for _ in range(3):
        interrupt(*words)
    (run,) = runs(here)
    assert step_of(run) == 6 and info_of(run)["config"]["trainer"]["max_minutes"] == 30


def test_missing_evaluation_is_written_without_training(here, monkeypatch):
    # patience ends the training early: the checkpoint alone does not tell that it has ended
    words = ("trainer.steps=99", "trainer.val_every=1", "trainer.patience=1", "optim.optimizer.lr=1e-30")
    words = (*(word for word in AUTO if "steps" not in word), *words)
    with monkeypatch.context() as patched:
        patched.setattr(ImageTraining, "evaluate", end)
        assert call(here, *words).status == 9
    (run,) = runs(here)
    trained = step_of(run)
    assert trained < 99 and not (run / "evaluation").exists()
    monkeypatch.setattr(ImageDataModule, "train_batches", lambda *_, **__: iter(()))
    run_checked(here, *words)
    assert (run / "evaluation/scores.json").exists() and step_of(run) == trained and runs(here) == [run]


def test_full_disk_of_rank_0_is_an_error_of_all_ranks(here, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def share(text, **_):
        shared.append(assert_refused(text, "No space left"))
        raise UserError(shared[0])

    shared = []
    monkeypatch.setattr("dinoseg.training.rendezvous.share_from_rank0", share)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(RunFolder, "write_config", fail)
    done = call(here, *AUTO)
    assert done.status == 1 and len(shared) == 1 and shared[0] in done.err


def test_restarted_sweep_runs_only_missing_jobs(quick, here, interrupt):
    sweep = ("-m", *AUTO, "hydra.sweep.dir=sweep", "seed=0,1,2")
    folder = here / "sweep"
    stopped = interrupt(*sweep, saves=5)
    assert (step_of(folder / "0"), step_of(folder / "1")) == (3, 2) and not (folder / "2").exists()
    assert f"resume=auto hydra.sweep.dir={folder}" in stopped.err
    before = files_of(folder / "0")
    done = run_checked(here, *sweep)
    seeds = {path.parent.name: info_of(path.parent)["config"]["seed"] for path in folder.glob("*/checkpoints")}
    assert seeds == {"0": 0, "1": 1, "2": 2} and {step_of(folder / name) for name in seeds} == {3}
    assert files_of(folder / "0") == before and len([*folder.glob("1/config*")]) == 2
    assert f"{folder / '0'} is finished at step 3: its result is reused." in done.err
    rows = (folder / "jobs.csv").read_text().splitlines()
    assert len(rows) == 4 and str(folder / "0") in rows[1] + rows[2] + rows[3]


def test_longer_sweep_trains_each_of_its_jobs_on(quick, here):
    sweep = ("-m", *AUTO, "hydra.sweep.dir=sweep", "seed=0,1")
    run_checked(here, *sweep)
    run_checked(here, *sweep, "trainer.steps=4")
    assert {path.parent.name: step_of(path.parent) for path in here.glob("sweep/*/checkpoints")} == {"0": 4, "1": 4}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", "01"),
        ("trainer.patience", "25"),
        pytest.param("trainer.steps", "32", marks=pytest.mark.heavy),
        pytest.param("engine.precision", ("fp32", "bf16"), marks=pytest.mark.heavy),
    ],
)
def test_job_of_a_sweep_takes_no_run_of_another_job(quick, here, key, values):
    sweep = ("-m", *AUTO, "hydra.sweep.dir=sweep")
    run_checked(here, *sweep, f"{key}={values[0]},{values[1]}")
    before = {name: files_of(here / "sweep" / name) for name in "01"}
    done = call(here, *sweep, f"{key}={values[1]},{values[0]}")
    refused = [line for line in done.err.splitlines() if "holds the run of another job" in line and key in line]
    # with more steps than that of its folder, a job of trainer.steps trains this one on
    assert done.status == 1 and len(refused) == (1 if key == "trainer.steps" else 2), done.err
    assert files_of(here / "sweep/0") == before["0"] and len(list(here.glob("sweep/*/checkpoints"))) == 2


def test_sweeps_without_a_folder_and_single_runs_are_new(quick, here, interrupt):
    interrupt("-m", *AUTO, "hydra.sweep.dir=outputs/base/sweep")
    done = run_checked(here, "-m", *AUTO, "seed=0,1")
    assert "this sweep is new" in done.err and step_of(here / "outputs/base/sweep/0") == 2
    run_checked(here, *AUTO)
    assert step_of(here / "outputs/base/sweep/0") == 2
    assert len(list(here.glob("outputs/**/checkpoints"))) == 4  # of the stopped job, two of the second sweep, one alone


def test_loser_of_a_race_starts_a_new_run(quick, here, interrupt, monkeypatch):
    interrupt(*AUTO)
    (run,) = runs(here)
    monkeypatch.setattr(resuming, "PATIENCE", 0)
    with open(run / "run.log", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = run_checked(here, *AUTO)
    assert str(run) in done.err and step_of(run) == 2 and len(runs(here)) == 2


@pytest.mark.heavy
def test_two_racing_processes_share_no_run(here, interrupt):
    interrupt(*AUTO, saves=1)
    (run,) = runs(here)
    command = [sys.executable, "-m", "dinoseg", *AUTO]
    racers = [subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [racer.communicate()[1] for racer in racers]
    # the one that comes later finds the run locked or finished, whichever is faster
    assert [racer.returncode for racer in racers] == [0, 0], errors
    assert len(runs(here)) == 2 and all(step_of(path) == 3 for path in runs(here)), errors
    assert len([error for error in errors if "resuming" in error]) == 1 and len(list(run.glob("config*"))) == 2


@pytest.mark.heavy
def test_racing_processes_train_a_given_folder_once(here, interrupt):
    interrupt(*AUTO, "hydra.run.dir=mine", saves=1)
    command = [sys.executable, "-m", "dinoseg", *AUTO, "hydra.run.dir=mine"]
    racers = [subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = sorted((racer.communicate()[1] for racer in racers), key=lambda text: "resuming" in text)
    assert "is finished" in errors[0] or "Another process is writing to" in errors[0], errors
    assert "resuming" in errors[1] and step_of(here / "mine") == 3 and len([*here.glob("mine*/config*")]) == 2, errors


def test_run_finished_before_its_lock_is_free_is_left_alone(quick, here, interrupt, monkeypatch):
    interrupt(*AUTO)
    (run,) = runs(here)
    enter, write = RunFolder.try_to_enter, checkpoint.write

    def finish_first(self, folder, **given):
        if folder == run:
            write_end(folder, 2, {"miou": 0.5})
        return enter(self, folder, **given)

    def check_free(*given):
        with open(run / "run.log", "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the training of the new run holds it
        write(*given)

    monkeypatch.setattr(RunFolder, "try_to_enter", finish_first)
    monkeypatch.setattr(checkpoint, "write", check_free)
    run_checked(here, *AUTO)
    assert step_of(run) == 2 and len(runs(here)) == 2


def test_unreadable_checkpoint_is_named_and_skipped(quick, here, interrupt):
    interrupt(*AUTO)
    (run,) = runs(here)
    (run / "checkpoints/last.safetensors").write_bytes(b"cut")
    done = run_checked(here, *AUTO)
    assert str(run / "checkpoints/last.safetensors") in done.err and len(runs(here)) == 2


def test_result_of_a_finished_run_is_returned(here):
    words = [word for word in TRAIN if not word.startswith(("mode=", "data.root"))]
    words += [f"data.root={here / 'data'}", f"cache_dir={here / 'cache'}"]
    first = dinoseg.train(None, *words, out_dir=here / "mine")
    second = dinoseg.train(None, *words, out_dir=here / "mine", resume="auto")
    assert second.folder == first.folder and second.scores.to_dict() == first.scores.to_dict()
    assert json.loads((here / "mine/training.json").read_text())["step"] == 3
    longer = dinoseg.train(None, *words[:-1], out_dir=here / "mine", resume="auto", trainer={"steps": 4})
    assert longer.folder == first.folder and longer.step == 4
