"""Several jobs of one command: each has its own folder, and a table of all ends the sweep."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import SMALL, call, write_data
from hydra.types import RunMode
from omegaconf import OmegaConf
from scipy import stats

from dinoseg.config.nodes import instantiate
from dinoseg.evaluation.image_record import ImageRecord, read_record, write_record
from dinoseg.evaluation.scoring.intervals import UnitScore
from dinoseg.extensions.sweeps import table as sweep_table
from dinoseg.extensions.sweeps.job_results import describe_runs
from dinoseg.extensions.sweeps.table import FOLD, SweepTable, over_folds
from dinoseg.models.heads.linear import LinearHead
from dinoseg.report.table import percent
from dinoseg.utils.errors import UserError

HOLDS = "import fcntl, sys, time; fcntl.flock(file := open(sys.argv[1], 'a'), 2); print(flush=True); time.sleep(1800)"
QUIET = ("mode.metrics_only=true", "mode.report=false", "mode.pictures=0")


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("jobs", "value"), [("0", "/my data/0"), ("1,0", "[/my data/1,/my data/0]"), ("7", None)])
def test_best_runs_can_be_pasted_into_a_shell(jobs, value):
    rows = [{"job": number, "run": f"/my data/{number}"} for number in "01"] + [{"job": "7", "run": ""}]
    lines = describe_runs(Path("/my data"), {"job": jobs}, rows)
    assert lines == ["runs: /my data/JOB", *([f"best: 'resume={value}'"] if value else [])]


def of_job(folder, number=0, sweeper=None, metric=None):
    """Return what Hydra's config says to a job of a sweep."""
    hydra = {"sweep": {"dir": str(folder)}, "sweeper": sweeper or {}, "mode": RunMode.MULTIRUN, "job": {"num": number}}
    hydra |= {"overrides": {"task": []}, "runtime": {"choices": {}, "config_sources": []}}
    return OmegaConf.create({"hydra": hydra, "mode": {}, "metric": metric or {}, "trust": None})


def end_job(folder, number, words, value, **config):
    job = SimpleNamespace(_return_value=value, overrides=["mode=train", *words.split()])
    SweepTable().on_job_end(of_job(folder, number, **config), job)


def end_sweep(folder, jobs, **config):
    """End a sweep of jobs, each words and what it returned, and return the rows of its table if it has one."""
    for number, (words, value) in enumerate(jobs):
        end_job(folder, number, words, value, **config)
    SweepTable().on_multirun_end(of_job(folder))  # jobs may have run elsewhere
    path = folder / "sweep.csv"
    return rows_of(path) if path.exists() else None


def of_heads(*values):
    return [(f"head=h{number}", value) for number, value in enumerate(values)]


def test_a_real_sweep_has_a_folder_per_job_and_a_table(tmp_path):
    write_data(tmp_path / "data")
    done = call(tmp_path, "-m", "mode=train", *SMALL, "mode.metrics_only=true", "head=linear,mlp")
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "outputs/base").glob("train_*")
    assert sorted(path.name for path in folder.iterdir()) == [
        "0",
        "1",
        "multirun.yaml",
        "sweep.csv",
        "table.md",
        "table.tex",
    ]
    rows = rows_of(folder / "sweep.csv")
    assert sorted(row["head"] for row in rows) == ["linear", "mlp"]
    assert [float(row["mIoU %"]) for row in rows] == sorted((float(row["mIoU %"]) for row in rows), reverse=True)
    for row in rows:
        run = folder / row["job"]
        assert (tmp_path / row["run"]).resolve() == run.resolve() and row["note"] == ""
        assert (run / "checkpoints/best.safetensors").is_file() and (run / "evaluation/scores.json").is_file()
        assert OmegaConf.load(run / "config/config.yaml").choices.head == row["head"]
        scores = json.loads((run / "evaluation/scores.json").read_text())
        assert row["mIoU %"] == f"{100 * scores['miou']:.2f}"  # the unit of the score table
    by_head = {row["head"]: row for row in rows}
    assert 0 < int(by_head["linear"]["trainable"]) < int(by_head["mlp"]["trainable"])
    assert all(int(row["trainable"]) < int(row["parameters"]) for row in rows)  # the mask token is not trained
    assert all(float(row["images_per_s"]) > 0 and 0.1 < float(row["memory_gib"]) < 20 for row in rows)
    table = done.out[done.out.index("\n  job  head") :]
    assert max(map(len, table.splitlines())) <= 140 and "trainer.steps" not in table
    assert f"written to {folder.relative_to(tmp_path)}/sweep.csv" in done.out
    best = f"{folder.relative_to(tmp_path)}/{rows[0]['job']}"
    lines = f"runs: {folder.relative_to(tmp_path)}/JOB", f"best: resume={best}\n"
    paper = (folder / "table.md").read_text().replace("\\_", "_")
    assert "\n".join(lines) in done.out and "\n\n".join(lines) in paper
    refused = call(tmp_path, "mode=serve", f"resume={folder.relative_to(tmp_path)}")
    assert f"is a sweep of 2 runs, the best by val/miou is {best}: give resume={best}.\n" in refused.err
    assert re.search(
        r"significantly worse than the best setting: [01] of 1; .*95 % interval \(over 2 images\)", done.out
    )
    command = f"python -m dinoseg mode=compare 'runs=[{folder.relative_to(tmp_path)}]'"
    assert f"test for differences from the first job: {command}" in done.out
    assert all(row["mIoU %"] in table for row in rows)


@pytest.mark.heavy
def test_failed_job_is_reported_and_other_jobs_run(tmp_path, monkeypatch):
    """Jobs whose data are missing are told in a message, one that crashes with its traceback."""
    write_data(tmp_path / "data")
    words = ("data.root=nowhere,data", "head.lr=0.01,0.02")
    forward = LinearHead.forward
    crashes = [True]

    def crash_once(head, features):
        if crashes:
            crashes.pop()
            raise RuntimeError("weights for another head")
        return forward(head, features)

    monkeypatch.setattr(LinearHead, "forward", crash_once)
    done = call(tmp_path, "-m", "mode=train", *SMALL, *QUIET, *words)
    assert done.status == 1 and done.err.count("Traceback") == 1
    assert done.err.count("error: data.root=nowhere: file or folder not found") == 2
    (folder,) = (tmp_path / "outputs/base").glob("train_*")
    good, *bad = rows_of(folder / "sweep.csv")
    assert good["job"] == "3" and float(good["mIoU %"]) >= 0 and good["note"] == "" and good["data.root"] == "data"
    assert [row["job"] for row in bad] == ["0", "1", "2"] and all(row["mIoU %"] == "" for row in bad)
    assert all(row["note"].startswith("data.root=nowhere") for row in bad[:2])
    assert bad[2]["note"].startswith("RuntimeError: ")
    assert "data.root=nowhere: file or folder not found" in " ".join(done.out.split())
    assert (folder / "3/checkpoints/best.safetensors").is_file() and not (folder / "0/checkpoints").exists()
    crashes.append(True)
    with pytest.raises(RuntimeError, match="weights for"):  # a single run shows where it broke
        call(tmp_path, "mode=train", *SMALL)


@pytest.mark.parametrize(
    ("words", "count", "cell"),
    [
        pytest.param(
            ("loss=cross_entropy,mask_classification", "seed=0,1"), "2 of 4 cells",
            "- loss=mask_classification seed=1: loss=mask_classification needs masks", marks=pytest.mark.heavy),
        (("loss=glob(*ss*)",), "cells", "loss=mask_classification"),
        # a key that is known once a job begins, and not where its cells are looked at
        (("loss=mask_classification", "cache_dir=${hydra:runtime.cwd}/cache"), "1 of 1 cell",
         "- each: loss=mask_classification needs masks"),
        (("trainer.score=miou,iou", "data.root=absent"), "1 of 2 cells", "- trainer.score=iou: trainer.score=iou is"),
        (("head=eomt,linear", "head.blocks=1"), "1 of 2 cells",
         "- head=linear: head.blocks=1: head=linear lacks this key. Options that have it: head=detail, head=eomt"),
    ],
)  # fmt: skip
def test_cells_that_cannot_work_are_refused_before_the_first_job(tmp_path, words, count, cell):
    write_data(tmp_path / "data")
    done = call(tmp_path, "-m", "mode=train", *SMALL, *words)
    assert done.status == 1 and f"{count} of this sweep cannot run, so no job is started:" in done.err
    assert cell in done.err and "Traceback" not in done.err and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("adapter.rank=0",), "adapter.rank=0"),
        (("data.folds=3", "data.fold=7"), "two folds or more"),
        (("trainer.steps=null",), "Neither trainer.steps nor trainer.epochs"),
        (("trainer.evaluate=newest",), "trainer.evaluate=newest is unknown"),
        (("loss.criterion.label_smoothing=2",), "loss.criterion.label_smoothing=2"),
        (("optim.schedule.kind=unknown",), "optim.schedule.kind=unknown"),
        (("optim.optimizer.betas=[0.9]",), r"optim.optimizer.betas=\[0.9\]"),
        (("logger=[mlflow]", "logger.mlflow.timeout=0"), "logger.mlflow.timeout=0"),
    ],
)
def test_check_of_a_cell_refuses_wrong_values_without_data(compose, words, reason):
    """As the check of a sweep's cells finds it: adapters and data are made."""
    cfg = compose("mode=train", *(word for word in SMALL if word != "adapter=full"), "adapter=lora", *words)
    with pytest.raises(UserError, match=reason):
        instantiate(cfg.mode.check)(cfg)


def sweep_config(mode, resume=None, head="linear"):
    hydra = {"runtime": {"choices": {"head": head}, "config_sources": []}, "overrides": {"task": []}}
    return OmegaConf.create({"mode": mode, "resume": resume, "hydra": hydra})


@pytest.mark.parametrize(
    ("keys", "error", "reason"),
    [
        ({"mode": {"check": {}}}, UserError("no"), "no"),
        ({"mode": {"check": {}}}, ValueError("no"), ""),  # left to the job
        ({"mode": {"check": {}}, "resume": "run"}, UserError("no"), ""),  # its config is merged later
        ({"mode": {}}, UserError("no"), ""),  # no mode that trains
    ],
)
def test_sweep_checks_only_new_trainings(monkeypatch, keys, error, reason):
    def fail(cfg):
        raise error

    composed = sweep_config(**keys)
    monkeypatch.setattr(sweep_table, "instantiate", lambda check: fail)
    assert sweep_table._fault(SimpleNamespace(load_sweep_config=lambda *_: composed), composed, []) == reason


def test_sweep_cell_is_checked_with_its_own_choices(monkeypatch):
    def tell(cfg):
        raise UserError(cfg.choices.head)

    sweep, cell = (sweep_config({"check": {}}, head=head) for head in ("linear", "mlp"))
    monkeypatch.setattr(sweep_table, "instantiate", lambda check: tell)
    assert sweep_table._fault(SimpleNamespace(load_sweep_config=lambda *_: cell), sweep, ["head=mlp"]) == "mlp"


@pytest.mark.heavy
def test_folds_are_summed_up_and_not_ranked(tmp_path):
    write_data(tmp_path / "data", train=4, val=2)
    for split in ("train", "val"):
        for path in list((tmp_path / f"data/{split}").rglob("*.png")):
            path.rename(path.with_name(f"{split}{path.name}"))
    done = call(tmp_path, "-m", "mode=train", *SMALL, *QUIET, "data.folds=2", "data.fold=0,1")
    assert done.status == 0, done.err
    (path,) = tmp_path.glob("outputs/base/train_*/sweep.csv")
    (row,) = rows_of(path)
    jobs = {row["data.fold"]: row for row in rows_of(path.with_name("jobs.csv"))}
    scores = [json.loads((path.parent / f"{job}/evaluation/scores.json").read_text()) for job in (0, 1)]
    mious = [100 * each["miou"] for each in scores]
    assert [float(jobs[fold]["mIoU %"]) for fold in "01"] == pytest.approx(mious, abs=0.01)
    assert float(row["mIoU % deviation"]) == pytest.approx(np.std(mious, ddof=1), abs=0.01)
    counts = np.sum([each["matrix"] for each in scores], axis=0)
    each = counts.diagonal() / (counts.sum(axis=0) + counts.sum(axis=1) - counts.diagonal())
    assert float(row["mIoU %"]) == pytest.approx(100 * each.mean(), abs=0.01)
    assert row["folds"] == "2" and row["mIoU % low"] == "" and row["mIoU %"] in done.out  # without mode.report


def test_the_best_job_comes_first_and_failures_last(tmp_path, capsys):
    failures = ({"error": "no"}, {"error": "ValueError: broken"})
    best = {"miou": 0.75, "accuracy": 0.5, "run": "r"}
    rows = end_sweep(tmp_path, of_heads({"miou": 0.25}, failures[0], best, failures[1], {"miou": 0}))
    assert "mIoU without background %" not in rows[0]  # which no job has
    assert [row["job"] for row in rows] == ["2", "0", "4", "1", "3"]
    assert [row["note"] for row in rows] == ["", "", "", "no", "ValueError: broken"]
    assert rows[0]["head"] == "h2" and rows[0]["run"] == "r" and rows[0]["pixel accuracy %"] == "50.00"
    shown = capsys.readouterr().out
    assert shown.index("75.00") < shown.index("25.00") < shown.index("ValueError: broken")


def test_job_failing_in_another_process_sets_exit_status_1(tmp_path, monkeypatch):
    monkeypatch.setattr("dinoseg.extensions.sweeps.table.os.getpid", iter(range(9)).__next__)
    with pytest.raises(SystemExit) as ended:
        end_sweep(tmp_path, of_heads({"miou": 0.5}, {"error": "no"}))
    assert ended.value.code == 1 and len(rows_of(tmp_path / "sweep.csv")) == 2


@pytest.mark.parametrize("values", [[], [None, None], [{"frames": 3}]])
def test_jobs_without_scores_make_no_table(tmp_path, values, capsys):
    assert end_sweep(tmp_path, of_heads(*values)) is None and capsys.readouterr().out == ""


def test_a_sweep_without_the_result_of_a_job_fails(tmp_path, monkeypatch, capsys):
    """Jobs of another machine may have another folder of that name."""
    monkeypatch.setattr("dinoseg.extensions.sweeps.table.impossible_cells", lambda _: ([], 2))
    callback = SweepTable()
    callback.on_multirun_start(of_job(tmp_path))
    end_job(tmp_path, 1, "head=b", {"miou": 0.5})
    with pytest.raises(SystemExit) as ended:
        callback.on_multirun_end(of_job(tmp_path))
    assert ended.value.code == 1 and [row["job"] for row in rows_of(tmp_path / "sweep.csv")] == ["1"]
    assert f"error: 1 of 2 jobs stored no result in {tmp_path}" in capsys.readouterr().err


def test_rows_of_a_resumed_search_are_preserved(tmp_path):
    for number in (0, 2):  # the second after a kill, or with more trials
        SweepTable().on_multirun_start(search := of_job(tmp_path, number, {"storage": "search.log"}))
        end_job(tmp_path, number, f"seed={number}", {"miou": 0.5}, sweeper={"storage": "search.log"})
        SweepTable().on_multirun_end(search)
    assert [row["job"] for row in rows_of(tmp_path / "sweep.csv")] == ["0", "2"]


def test_settings_of_folds_are_ranked_by_their_pooled_score(tmp_path):
    matrices = {"a": [[[1, 1], [1, 1]], [[9, 1], [0, 0]]], "b": [[[5, 0], [0, 5]], [[4, 1], [0, 5]]]}
    shares = dict.fromkeys(("miou", "miou_no_background", "accuracy"), 0.5)
    jobs = [
        (f"head={head} data.fold={fold}", {**shares, "matrix": counts[fold], "background": 1})
        for fold in (0, 1)
        for head, counts in matrices.items()
    ]
    rows = end_sweep(tmp_path, jobs)
    assert [(row["head"], row["folds"], row["job"]) for row in rows] == [("b", "2", "1,3"), ("a", "2", "0,2")]
    assert rows[0]["pixel accuracy %"] == "95.00" and rows[0]["mIoU % deviation"] == "0.00"
    assert rows[0]["mIoU without background %"] == "90.00"  # 9 of 10: class 0 alone
    assert [row["data.fold"] for row in rows_of(tmp_path / "jobs.csv")] == ["0", "0", "1", "1"]


def test_undefined_pooled_scores_are_dashes_at_the_end(tmp_path):
    matrices = {"a": [[3, 1], [1, 3]], "none": [[0, 0], [0, 0]], "b": [[4, 1], [1, 3]]}
    jobs = [
        (f"data.fold={fold} head={head}", {"miou": 0.5, "accuracy": 0.5, "matrix": matrix})
        for fold in (0, 1)
        for head, matrix in matrices.items()
    ]
    rows = end_sweep(tmp_path, jobs)
    assert [row["head"] for row in rows] == ["b", "a", "none"] and rows[2]["mIoU %"] == ""
    last = (tmp_path / "table.md").read_text().split("| none")[1].splitlines()[0]
    assert [cell.strip() for cell in last.split("|")[1:]] == ["2", "-", "-", ""]


@pytest.mark.parametrize(("ignored", "miou"), [(None, 1.5 / 3), (0, 1.5 / 2)])
def test_pooled_means_leave_out_the_ignored_class(ignored, miou):
    matrix = [[0, 0, 0], [1, 1, 0], [0, 0, 4]]
    fold = {"job": 0, "note": "", "miou": None, "matrix": matrix, "ignored_class": ignored}
    (row,) = over_folds([fold | {FOLD: "0"}, fold | {FOLD: "1"}], [], ["miou"])
    assert row["folds"] == 2 and row["miou"] == pytest.approx(miou)


def test_long_number_is_rounded_on_screen_but_not_in_the_file(tmp_path, capsys):
    jobs = [
        (f"lr={lr} data.root={root}", {"miou": 0.5, "run": "r"})
        for lr, root in (("0.0012345678901234567", "1.2.3.4"), ("1", "x"))
    ]
    end_sweep(tmp_path, jobs)
    shown = capsys.readouterr().out
    assert " 0.00123457 " in shown and " 1.2.3.4 " in shown
    assert "0.0012345678901234567" in (tmp_path / "sweep.csv").read_text()


def test_settings_are_compared_with_further_metrics(tmp_path, monkeypatch):
    given = []

    def refuse(runs, build_metrics=None):
        given.append(build_metrics)
        raise UserError(str(runs))

    monkeypatch.setattr("dinoseg.extensions.compare.sides.sides_of", refuse)
    end_sweep(tmp_path, of_heads(*[{"miou": 0.5, "run": "r"}] * 2))
    assert callable(*given)


def test_folder_belongs_to_one_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dinoseg.extensions.sweeps.table.impossible_cells", lambda _: ([], 0))
    SweepTable().on_multirun_start(of_job(tmp_path))
    SweepTable().on_multirun_end(of_job(tmp_path))
    (tmp_path / ".jobs").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / ".jobs/sweep.own"], stdout=subprocess.PIPE) as other:
        other.stdout.read(1)
        for sweeper in ({}, {"storage": "search.log"}):
            with pytest.raises(SystemExit):
                SweepTable().on_multirun_start(of_job(tmp_path, sweeper=sweeper))
            assert "another sweep is running" in capsys.readouterr().err
        monkeypatch.setenv("RANK", "1")
        SweepTable().on_multirun_start(of_job(tmp_path))
        other.kill()


def test_damaged_row_does_not_prevent_the_table(tmp_path, capsys):
    (tmp_path / ".jobs").mkdir()
    for number, text in enumerate(("", "[]", '{"job": 1}')):
        (tmp_path / f".jobs/{90 + number}.json").write_text(text)
    rows = end_sweep(tmp_path, of_heads({"miou": 0.5}, {"miou": 0.25, "loss": float("nan")}))
    assert [row["mIoU %"] for row in rows] == ["50.00", "25.00"]
    assert capsys.readouterr().err.count("is damaged") == 3


def test_seeds_are_summed_up_with_an_interval(tmp_path, capsys):
    mious = {"a": (0.5, 0.52, 0.57), "b": (0.7, 0.6, 0.62), "c": (0.4, None, None)}
    costs = {"parameters": 30, "trainable": 10, "images_per_s": 2.0, "run": "r"}
    jobs = [
        (f"seed={seed} head={head}", {"error": "it broke"} if miou is None else {"miou": miou, **costs})
        for seed in range(3)
        for head, miou in ((head, mious[head][seed]) for head in mious)
    ]
    rows = end_sweep(tmp_path, jobs)
    assert [(row["head"], row["seeds"], row["job"]) for row in rows] == [
        *(("b", "3", "1,4,7"), ("a", "3", "0,3,6"), ("c", "1", "2,5,8"))
    ]
    for row, head in zip(rows, "ba", strict=False):
        values = 100 * np.array(mious[head])
        low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
        expected = [values.mean(), values.std(ddof=1), low, high]
        found = [float(row[f"mIoU %{part}"]) for part in ("", " deviation", " low", " high")]
        assert found == pytest.approx(expected, abs=0.0051) and row["parameters"] == "30" and row["note"] == ""
    assert rows[2]["mIoU %"] == "40.00" and rows[2]["mIoU % low"] == rows[2]["mIoU % deviation"] == ""
    assert rows[2]["note"] == "1 of 3 seeds: it broke"
    assert [row["seed"] for row in rows_of(tmp_path / "jobs.csv")] == [*"021210012"]
    shown = capsys.readouterr().out
    assert all(rows[0][f"mIoU %{part}"] in shown for part in ("", " deviation", " low", " high"))
    assert "mode=compare" not in shown  # no job has a record of its images
    assert "each job to" in shown and max(map(len, shown.splitlines()[:6])) <= 140


def test_chosen_metrics_have_a_column_of_the_table(tmp_path, capsys):
    shared = {"miou": 0.5, "boundary_iou": 0.75, "loss": 0.5}
    jobs = [
        ("seed=0", {**shared, "cldice": 0.25, "x": 2.0, "x_infinite_images": 0.0}),
        ("seed=1", {**shared, "cldice": 0.5, "x": None, "x_infinite_images": 3.0}),
    ]
    (row,) = end_sweep(tmp_path, jobs, metric={"cldice": {}, "absent": {}, "miou": {}, "x": {}})
    assert row["cldice"] == "0.375" and float(row["cldice deviation"]) == pytest.approx(0.125 * 2**0.5)
    assert row["x"] == row["x deviation"] == "" and row["x_infinite_images"] == "1.5"  # no mean of an infinite value
    assert (tmp_path / "sweep.csv").read_text().count("mIoU %,") == 1
    assert "boundary_iou" not in row and "absent" not in row and "0.3750" in capsys.readouterr().out


def test_swept_loss_and_its_value_have_columns(tmp_path):
    losses = (("dice", 0.2), ("focal", 0.5))
    jobs = [(f"loss={name} seed={seed}", {"loss": 0.1 * seed + shift}) for seed in (0, 1) for name, shift in losses]
    rows = end_sweep(tmp_path, jobs)
    assert [(row["loss"], row["val/loss"]) for row in rows] == [("dice", "0.25"), ("focal", "0.55")]
    assert "+0.3000" in (tmp_path / "table.md").read_text()  # main effect
    for name in ("sweep.csv", "jobs.csv"):
        heads = (tmp_path / name).read_text().splitlines()[0].split(",")
        assert len(set(heads)) == len(heads)


def test_a_sweep_over_seeds_alone_is_one_row(tmp_path):
    scores = [{"miou": 0.9 + 0.09 * seed, "accuracy": 0.01 + 0.1 * seed, "loss": 1.0} for seed in range(2)]
    (row,) = end_sweep(tmp_path, [(f"seed={seed}", each) for seed, each in enumerate(scores)])
    assert row["seeds"] == "2" and row["val/loss deviation"] == "0.0" and "seed" not in row
    ends = [float(row[f"{key} {end}"]) for key in ("mIoU %", "pixel accuracy %") for end in ("low", "high")]
    assert ends[0] > 0 and ends[1] == 100 and ends[2] == 0 and ends[3] < 100  # intervals end at 0 and 100 %


def test_row_of_failed_seeds_reports_the_failure(tmp_path, capsys):
    (row,) = end_sweep(tmp_path, [(f"seed={seed}", {"error": "no"}) for seed in range(2)])
    assert row["note"] == "0 of 2 seeds: no" and row["seeds"] == "0" and "0 of 2 seeds: no" in capsys.readouterr().out


def test_seeds_of_a_fold_are_averaged_before_pooling(tmp_path):
    counts = {(0, 0): [[2, 1], [1, 1]], (0, 1): [[9, 1], [0, 0]], (1, 0): [[3, 0], [0, 2]], (1, 1): [[4, 6], [0, 0]]}
    shares = {"miou": 0.5}
    jobs = [
        (f"seed={seed} data.fold={fold}", {**shares, "accuracy": float(np.trace(each) / np.sum(each)), "matrix": each})
        for (seed, fold), each in counts.items()
    ]
    (row,) = end_sweep(tmp_path, jobs)
    folds = np.array([(3 / 5 + 5 / 5) / 2, (9 / 10 + 4 / 10) / 2])  # the means over seeds
    assert float(row["pixel accuracy %"]) == pytest.approx(100 * (4 + 6.5) / 15, abs=0.01)
    assert float(row["pixel accuracy % deviation"]) == pytest.approx(100 * folds.std(ddof=1), abs=0.01)
    assert (row["folds"], row["seeds"]) == ("2", "2")
    assert "data.fold" not in row and len(rows_of(tmp_path / "jobs.csv")) == 4


@pytest.mark.heavy
def test_interval_of_folds_is_that_of_their_images(tmp_path):
    write_data(tmp_path / "data", train=4, val=2)
    for path in list((tmp_path / "data/val").rglob("*.png")):
        path.rename(path.with_name(f"val{path.name}"))
    folds = ("data.folds=3", "data.fold=0,1,2", "head=linear,mlp")
    done = call(
        tmp_path, "-m", "mode=train", *SMALL, "mode.metrics_only=true", "mode.pictures=0", *folds, "metric=[nsd]"
    )
    assert done.status == 0, done.err
    (path,) = tmp_path.glob("outputs/base/train_*/sweep.csv")
    rows = {row["head"]: row for row in rows_of(path)}
    records = {job: read_record(path.parent / f"{job}/evaluation") for job in range(6)}
    for head, jobs in (("linear", (0, 2, 4)), ("mlp", (1, 3, 5))):
        counts = np.concatenate([records[job].counts for job in jobs])
        assert len(counts) == 6  # each image once
        right, held, found = np.moveaxis(counts.sum(axis=0) - counts, 1, 0)
        left = (right / (held + found - right)).mean(axis=1)
        right, held, found = counts.sum(axis=0)
        value = (right / (held + found - right)).mean()
        reach = stats.t.ppf(0.975, 5) * np.sqrt(5 / 6 * ((left - left.mean()) ** 2).sum()) / (value * (1 - value))
        ends = [100 / (1 + np.exp(-np.log(value / (1 - value)) - sign * reach)) for sign in (-1, 1)]
        found = [float(rows[head][f"mIoU %{part}"]) for part in ("", " low", " high")]
        assert found == pytest.approx([100 * value, *ends], abs=0.0051)
        assert records[jobs[0]].source.endswith("best.safetensors")
        stored = [np.load(path.parent / f"{job}/evaluation/counts.npz") for job in jobs]
        values, images = sum(each["nsd/pairs"].sum(axis=(0, 2)) for each in stored)
        assert float(rows[head]["nsd"]) == pytest.approx(values / images, abs=1e-12)
    assert "significantly worse than the best setting" in done.out
    assert "each image is scored by the run of its fold (3 folds). Weights: the last," in done.out
    done = call(tmp_path, "mode=compare", f"runs=[{path.parent}]", "hydra.run.dir=compared")
    assert done.status == 0 and "over 6 images" in done.out, done.err
    compared = json.loads((tmp_path / "compared/compare.json").read_text())
    assert compared["folds"] == {"linear": 3, "mlp": 3}
    gap = 100 * compared["others"]["mlp"]["differences"]["miou"]["value"]
    assert gap == pytest.approx(float(rows["mlp"]["mIoU %"]) - float(rows["linear"]["mIoU %"]), abs=0.011)


def test_failed_folds_and_seeds_are_counted(tmp_path):
    good = {"miou": 0.5, "matrix": [[2, 1], [1, 1]]}
    failed = {"error": "it broke"}
    values = {(0, 0): good, (0, 1): failed, (1, 0): good, (1, 1): good, (2, 0): failed, (2, 1): failed}
    jobs = [(f"data.fold={fold} seed={seed}", value) for (fold, seed), value in values.items()]
    (row,) = end_sweep(tmp_path, jobs)
    assert (row["folds"], row["seeds"], row["note"]) == ("2", "1", "3 of 6 jobs: it broke")
    assert float(row["mIoU %"]) == pytest.approx(100 * (2 / 4 + 1 / 3) / 2, abs=0.01)


def end_factorial(folder, **config):
    """End a sweep of two heads, two ranks and two seeds, of which one job fails and one has no score."""
    jobs = [
        (f"head={head} rank={rank} seed={seed}", {"miou": 0.5 + 0.1 * (head == "b") + 0.01 * seed, "accuracy": 0.75})
        for head in "ab"
        for rank in (4, 8)
        for seed in (0, 1)
    ]
    jobs[2] = (jobs[2][0], {"error": "ValueError: 100 % broken"})
    jobs[5] = (jobs[5][0], {"miou": None, "accuracy": 0.75})
    return end_sweep(folder, jobs, **config)


def test_main_effects_are_printed_and_written_for_papers(tmp_path, capsys):
    end_factorial(tmp_path)
    shown = capsys.readouterr().out
    markdown = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    # as statsmodels' OLS of the six runs with a score
    assert [row for row in rows if row[0] in ("head", "rank")][1:] == [
        *(["head", "a", "3", "50.75", "-", "-"], ["head", "b", "3", "60.25", "+9.50", "[+7.91, +11.09]"]),
        *(["rank", "4", "3", "55.25", "-", "-"], ["rank", "8", "3", "55.75", "+0.50", "[-1.09, +2.09]"]),
    ]
    assert "+9.50" in shown and "3 degrees of freedom" in shown
    failed = "job 2 (head=a rank=8 seed=0) has no score: ValueError: 100 % broken"
    assert failed in shown and "job 5 (head=b rank=4 seed=1) has no score\n" in markdown
    latex = (tmp_path / "table.tex").read_text()
    assert f"% {failed}" in latex and latex.count("\\toprule") == 2


def test_table_for_papers_has_seeds_and_intervals(tmp_path):
    end_factorial(tmp_path)
    markdown = (tmp_path / "table.md").read_text()
    lines = {line.split("|")[1].strip() + line.split("|")[2].strip(): line for line in markdown.splitlines()[2:8]}
    assert "60.50 ± 0.71 [54.15, 66.85] (2 seeds)" in lines["b8"] and "± 0.00 [75.00, 75.00] (2 seeds)" in lines["b8"]
    assert lines["a8"].count("[") == 0 and " 51.00 |" in lines["a8"]  # of one seed
    assert " - | 75.00 ± 0.00 [" in " ".join(lines["b4"].split())  # undefined in one of two seeds
    assert "Nothing is bold: rows were not compared." in markdown and "**" not in markdown


def test_effect_has_no_negative_zero(tmp_path):
    jobs = [(f"head={head} seed={seed}", {"miou": 0.5 - 1e-6 * (head == "b")}) for head in "ab" for seed in (0, 1)]
    end_sweep(tmp_path, jobs)
    assert "+0.00" in (markdown := (tmp_path / "table.md").read_text()) and "-0.00" not in markdown
    assert percent(-1e-6, 2, "+") == "+0.00" and percent(-1e-6, 2) == "0.00"


def write_evaluation(folder, shares, fold, **changes):
    """Write the evaluation of a run that is right in these shares of two classes; `fold` may be None."""
    images = [f"{fold}_{number}" for number in range(20)]
    held = np.full((20, 2), [9000, 1000])
    right = (held * shares + np.arange(20)[:, None]).astype(int)
    found = {"classes": ["a", "b"], "palette": [(0, 0, 0)] * 2, "ignore_index": 255, "background": None, "data": "x"}
    found |= {"root": "", "split": "val", "unit": "image", "source": "", "images": images, "units": images}
    (folder / "config").mkdir(parents=True)
    write_record(ImageRecord(**found, counts=np.stack([right, held, held], axis=1), **changes), folder)
    if fold is not None:
        config = {"seed": 0, "data": {"fold": fold, "folds": 2}, "head": {"x": str(shares)}, "choices": {}}
        OmegaConf.save(config, folder / "config/config.yaml")


@pytest.mark.parametrize("folds", [(None,), (0, 1)])
@pytest.mark.parametrize(
    ("further", "best", "bold"),
    [
        ((), None, [("a", "mIoU %"), ("b", "pixel accuracy %")]),
        ([{"error": "no"}], None, []),  # not better than a row without a score
        ((), {"miou": (0, 0), "dice": (0, 2)}, []),  # a score without a column
    ],
)
def test_best_cells_of_a_sweep_are_bold(tmp_path, monkeypatch, folds, further, best, bold):
    if best:
        monkeypatch.setattr("dinoseg.extensions.compare.comparison.find_best", lambda sides: best)
    jobs = []
    for fold in folds:
        for head, shares in (("c", (0.8, 0.2)), ("b", (0.98, 0.3)), ("a", (0.9, 0.9))):
            run = tmp_path / f"runs/{head}{fold}"
            write_evaluation(run, shares, fold)
            scores = {"miou": sum(shares) / 2, "accuracy": 0.9 * shares[0] + 0.1 * shares[1]}
            jobs.append((f"data.fold={fold} head={head}", scores | {"run": str(run)}))
        jobs += [(f"data.fold={fold} head=d", each) for each in further]
    end_sweep(tmp_path, jobs)
    caption, *lines = (tmp_path / "table.md").read_text().split("\n\nMain")[0].splitlines()
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    found = [(row[0], head) for row in rows for head, cell in zip(heads, row, strict=True) if cell.startswith("**")]
    assert found == bold and ("Bold: " if bold else "Nothing is bold: no score is") in caption
    assert [row[0] for row in rows] == ["a", "b", "c", *["d"] * len(further)]
    assert ("over images or groups and over seeds" in caption) == (len(folds) > 1)


def test_scores_that_folds_cannot_pool_are_left_out(tmp_path, capsys):
    jobs = []
    expected = {}
    for head, shares, precision in (("a", [(0.8, 0.6), (0.6, 0.2)], 0.1), ("b", [(0.7, 0.1), (0.5, 0.3)], 0.9)):
        for fold in (0, 1):
            further = {"AP": UnitScore(precision, [precision] * 20, [True] * 20)}
            write_evaluation(tmp_path / f"{head}{fold}", shares[fold], fold, scores=further)
            scores = {"miou": sum(shares[fold]) / 2, "AP": precision, "AP50": precision, "cldice": 0.5}
            jobs.append((f"head={head} data.fold={fold}", scores | {"run": str(tmp_path / f"{head}{fold}")}))
        right, held, _ = np.concatenate([read_record(tmp_path / f"{head}{fold}").counts for fold in (0, 1)]).sum(axis=0)
        expected[head] = 100 * (right / (2 * held - right)).mean()
    rows = end_sweep(tmp_path / "sweep", jobs, metric={"cldice": {}})
    shown = capsys.readouterr().out
    caption = (tmp_path / "sweep/table.md").read_text()
    assert [row["head"] for row in rows] == ["a", "b"]  # by what is pooled
    assert {row["head"]: float(row["mIoU %"]) for row in rows} == pytest.approx(expected, abs=0.0051)
    assert not [name for name in rows[0] if name.startswith(("AP", "cldice"))] and caption.startswith("Score over all")
    assert [row["AP %"] for row in rows_of(tmp_path / "sweep/jobs.csv")] == ["90.00", "90.00", "10.00", "10.00"]
    said = "cannot be pooled over folds"
    assert "AP %, AP50 %, cldice. To pool those of one recipe, give its run of each fold: python -m dinoseg" in shown
    assert shown.count(said) == caption.count(said) == 1
    done = call(tmp_path, "mode=compare", "runs=[[a0,a1],[b0,b1]]")
    assert done.status == 0 and done.err.count(said) == 1 and "left out: AP. " in done.err, done.err


def test_mean_over_folds_is_not_called_pooled(tmp_path):
    """Layers have no matrix, and no record with `mode.report=false`."""
    jobs = [(f"head={head} data.fold={fold}", {"miou": 0.5 + 0.1 * fold}) for head in "ab" for fold in (0, 1)]
    assert [row["mIoU %"] for row in end_sweep(tmp_path / "means", jobs)] == ["55.00", "55.00"]
    assert (tmp_path / "means/table.md").read_text().startswith("Mean over folds ±")
    for fold in (0, 1):
        write_evaluation(tmp_path / f"a{fold}", (0.8, 0.6), fold)
        jobs[fold][1]["run"] = str(tmp_path / f"a{fold}")
    rows = end_sweep(tmp_path / "pooled", [*jobs, ("head=c data.fold=0", {"miou": 0.25})])
    assert [row["head"] for row in rows] == ["a", "c", "b"] and rows[1]["mIoU %"] == "25.00"  # c has one fold
    assert rows[0]["mIoU % deviation"] and rows[2]["mIoU %"] == rows[2]["mIoU % deviation"] == ""
    assert (tmp_path / "pooled/table.md").read_text().startswith("Score over all folds ±")


def test_folds_without_a_pooled_score_are_ranked_by_loss(tmp_path):
    jobs = [
        (f"head={head} data.fold={fold}", {"AP": 0.5, "loss": loss, "parameters": 30, "matrix": [[3, 1], [1, 3]]})
        for head, loss in (("a", 0.5), ("b", 0.25))
        for fold in (0, 1)
    ]
    rows = end_sweep(tmp_path, [*jobs, ("head=c data.fold=0", {"AP": 0.5, "loss": 0.125, "parameters": 30})])
    assert [(row["head"], row["val/loss"], row["parameters"]) for row in rows] == [
        *(("c", "0.125", "30"), ("b", "0.25", "30"), ("a", "0.5", "30"))
    ]
    assert "| 0.2500" in (tmp_path / "table.md").read_text()


def test_search_and_sweep_over_one_key_have_no_main_effects(tmp_path, capsys):
    end_sweep(tmp_path, of_heads({"miou": 0.5}, {"miou": 0.25}, {"miou": None}))
    markdown = (tmp_path / "table.md").read_text()
    assert "Main effects" not in capsys.readouterr().out + markdown and "| h2     |        - |" in markdown
    sweeper = {"storage": "search.log"}
    for number in range(6):
        end_job(tmp_path, number, f"head={number % 2} seed={number}", {"miou": 0.5}, sweeper=sweeper)
    SweepTable().on_multirun_end(of_job(tmp_path, sweeper=sweeper))
    assert "Main effects" not in capsys.readouterr().out and "| 5      |" in (tmp_path / "table.md").read_text()
