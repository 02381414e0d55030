"""Further metrics by the command line: best checkpoint, evaluation, report, resuming, and what is refused."""

import csv
import json
import shutil

import pytest
from command_line import SLOTS, SMALL, call, write_data

from dinoseg.report.log import read_rows
from dinoseg.training import checkpoint
from dinoseg.utils.atomic import write_text

METRICS = ("metric=[boundary_iou,nsd,ece]", "metric.nsd.tolerance=1", "trainer.score=boundary_iou")
MACHINE = ("engine=cpu", "engine.workers=0", "logger=[]")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a folder in which a training has chosen its best checkpoint by Boundary IoU."""
    where = tmp_path_factory.mktemp("metrics")
    write_data(where / "data", val=3)
    length = ("trainer.steps=6", "trainer.val_every=1", "mode.metrics_only=true", "hydra.run.dir=run")
    done = call(where, "mode=train", *SMALL, *METRICS, *length, "logger=[]")
    assert done.status == 0, done.err
    return where


def test_best_checkpoint_and_scores_are_those_of_the_metric(run):
    rows = [row for row in read_rows(run / "run/metrics.jsonl") if "val/boundary_iou" in row]
    values = [row["val/boundary_iou"] for row in rows]
    progress = checkpoint.describe(run / "run/checkpoints/best.safetensors")["progress"]
    assert len(values) == 6 and all({"val/nsd", "val/ece", "val/miou"} <= row.keys() for row in rows)
    assert progress["best"] == max(values) and progress["best_step"] == rows[values.index(max(values))]["step"]
    scores = json.loads((run / "run/evaluation/scores.json").read_text())
    assert scores["boundary_iou"] == max(values) and scores["classes"][1]["nsd"] is not None
    with (run / "run/evaluation/scores.csv").open() as file:
        assert next(csv.reader(file))[-2:] == ["boundary_iou", "nsd"]
    page = (run / "run/evaluation/report.html").read_text()
    assert "boundary_iou" in page and f"{100 * max(values):.1f} %" in page
    assert f"validation: 6, {values[-1]:.4g}" in page  # in the curve of trainer.score


def test_evaluation_takes_metrics_of_the_run_or_of_the_command(run):
    found = {}
    for name, words in (("own", ()), ("none", ("metric=[]",)), ("other", ("metric=nsd", "metric.nsd.tolerance=0"))):
        done = call(run, "mode=eval", "resume=run", *MACHINE[:2], *words, "mode.report=false", f"hydra.run.dir={name}")
        assert done.status == 0, done.err
        found[name] = json.loads((run / name / "scores.json").read_text())
        assert ("\nnsd " in done.out) == (name != "none")
    trained = json.loads((run / "run/evaluation/scores.json").read_text())
    assert found["own"] == trained and "nsd" not in found["none"]
    assert "boundary_iou" not in found["other"] and found["other"]["nsd"] < found["own"]["nsd"]
    assert found["none"]["miou"] == trained["miou"]


def test_comparison_and_its_page_have_the_metrics_of_both_runs(run):
    words = ("mode=eval", "resume=run", *MACHINE[:2], "resolution.scale=0.5", "hydra.run.dir=half")
    assert call(run, *words).status == 0
    done = call(run, "mode=compare", "runs=[run,half]", "hydra.run.dir=compared")
    assert done.status == 0 and "boundary_iou" in done.out and "ece" in done.out, done.err
    compared = json.loads((run / "compared/compare.json").read_text())
    half = json.loads((run / "half/scores.json").read_text())
    scores = compared["others"]["half"]["scores"]
    assert {name: scores[name] for name in ("boundary_iou", "nsd", "ece")}.items() <= half.items()
    assert compared["others"]["half"]["differences"]["nsd"]["ci95"] is not None
    assert "boundary_iou" in (run / "compared/report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other:\n  _target_: dinoseg.metrics.BoundaryIoU", "metric=other has boundary_iou. Choose one of these."),
        ("_target_: dinoseg.metrics.BoundaryIoU", "Put `_target_` and its arguments below the key NAME:"),
    ],
)
def test_a_metric_file_with_another_key_is_explained(text, message, tmp_path):
    write_data(tmp_path / "data")
    write_text(tmp_path / "mine/metric/other.yaml", text)
    words = ("--config-dir", str(tmp_path / "mine"), "mode=train", *SMALL, "metric=[other]", "trainer.score=other")
    done = call(tmp_path, *words)
    assert done.status == 1 and message in done.err


class MissedObject:
    """A distance of another library which is infinite for each image."""

    def reset(self):
        pass

    def update(self, prediction, target):
        pass

    def compute(self):
        return float("inf")


def test_a_score_infinite_for_all_images_selects_a_checkpoint(tmp_path):
    write_data(tmp_path / "data")
    wrapped = {"_target_": "dinoseg.metrics.wrapped.WrappedMetric", "name": "hd", "better": "min", "is_share": False}
    distance = {**wrapped, "ignored": "match", "metric": {"_target_": f"{__name__}.MissedObject"}}
    write_text(tmp_path / "mine/metric/hd.yaml", json.dumps({"hd": distance}))
    words = ("--config-dir", tmp_path / "mine", "mode=train", *SMALL, "metric=[hd]", "trainer.score=hd")
    done = call(tmp_path, *words, "mode.metrics_only=true", "mode.report=false", "logger=[]", "hydra.run.dir=run")
    assert done.status == 0, done.err
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    assert scores["hd"] is None and scores["hd_infinite_images"] > 0


def test_resuming_by_another_score_or_option_discards_the_best(run, tmp_path):
    for number, words in enumerate(("trainer.score=ece", "metric.boundary_iou.ratio=0.2")):
        copy = tmp_path / str(number)
        shutil.copytree(run / "run", copy)
        done = call(run, "mode=train", f"resume={copy}", *MACHINE, "trainer.steps=7", words)
        assert done.status == 0 and "Checkpoint selection changed to" in done.err, done.err


def test_other_classes_of_a_second_score_discard_the_best(tmp_path):
    write_data(tmp_path / "data")
    words = ("trainer.score=skeleton_recall", "metric=[cldice]", "mode.metrics_only=true", "hydra.run.dir=run")
    done = call(tmp_path, "mode=train", *SMALL, *words, "logger=[]")
    assert done.status == 0, done.err
    length = (*MACHINE, "trainer.steps=3", "mode.metrics_only=true")
    done = call(tmp_path, "mode=train", "resume=run", *length, "metric.cldice.classes=[0]")
    assert done.status == 0 and "to skeleton_recall classes=[0] of all images" in done.err, done.err


def test_auto_resume_takes_a_run_of_other_scores(tmp_path):
    write_data(tmp_path / "data")
    words = ("mode=train", *SMALL, "resume=auto", "logger=[]", "hydra.run.dir=run", "mode.metrics_only=true")
    assert call(tmp_path, *words).status == 0
    done = call(tmp_path, *words, "metric=nsd", "trainer.score=nsd", "trainer.steps=3")
    assert done.status == 0 and "resuming" in done.err, done.err
    assert checkpoint.describe(tmp_path / "run/checkpoints/last.safetensors")["choices"]["metric"] == ["nsd"]


def test_scores_and_classes_that_do_not_fit_are_refused(tmp_path):
    write_data(tmp_path / "data")
    absent = call(tmp_path, "mode=train", *SMALL, "trainer.score=nsd")
    assert absent.status == 1 and "Add metric=[nsd]" in absent.err
    wrong = call(tmp_path, "mode=train", *SMALL, "metric=nsd", "trainer.score=nds")
    assert wrong.status == 1 and "mean_accuracy" in wrong.err
    assert "metric=[NAME] adds boundary_iou, cldice, ece" in wrong.err
    classes = call(tmp_path, "mode=train", *SMALL, "metric=cldice", "metric.cldice.classes=[5]", "hydra.run.dir=run")
    assert classes.status == 1 and "metric.cldice.classes=[5]: give ids of classes, from 0 to 1" in classes.err
    assert not (tmp_path / "run/metrics.jsonl").exists()  # before the first step
    foreign = call(tmp_path, "mode=train", *SMALL, "metric=[../loss/bce]")
    assert foreign.status == 1 and "is not a metric. Choose options of the group metric" in foreign.err
    clips = call(tmp_path, *SLOTS, "metric=[nsd]")
    assert clips.status == 1 and "metric=[nsd] scores images with masks" in clips.err
