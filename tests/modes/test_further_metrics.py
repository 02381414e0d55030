"""Scores of a training: further metrics, the background, the best checkpoint, resuming, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
from command_line import SMALL, call, succeed, write_data
from config_files import read_whole
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.config.resolvers import register_resolvers
from dinoseg.experiment.builder import Builder
from dinoseg.report.log import read_rows
from dinoseg.training import checkpoint
from dinoseg.utils.atomic import write_text

METRICS = ("metric=[boundary_iou,nsd,ece]", "metric.nsd.tolerance=1", "trainer.score=boundary_iou")
BARE = ("mode.metrics_only=true", "mode.report=false", "logger=[]")
MACHINE = ("engine=cpu", "engine.workers=0", "logger=[]")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a folder in which a training has chosen its best checkpoint by Boundary IoU."""
    where = tmp_path_factory.mktemp("metrics")
    write_data(where / "data", val=3)
    length = ("trainer.steps=6", "trainer.val_every=1", "mode.metrics_only=true", "hydra.run.dir=run")
    succeed(where, "mode=train", *SMALL, *METRICS, *length, "logger=[]")
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


@pytest.mark.heavy
def test_evaluation_takes_metrics_of_the_run_or_of_the_command(run):
    found = {}
    for name, words in (("own", ()), ("none", ("metric=[]",)), ("other", ("metric=nsd", "metric.nsd.tolerance=0"))):
        words = (*words, "mode.report=false", f"hydra.run.dir={name}")
        done = succeed(run, "mode=eval", "resume=run", *MACHINE[:2], *words)
        found[name] = json.loads((run / name / "scores.json").read_text())
        assert ("\nnsd " in done.out) == (name != "none")
    trained = json.loads((run / "run/evaluation/scores.json").read_text())
    assert found["own"] == trained and "nsd" not in found["none"]
    assert "boundary_iou" not in found["other"] and found["other"]["nsd"] < found["own"]["nsd"]
    assert found["none"]["miou"] == trained["miou"]


def test_counts_are_stored_unless_they_are_in_bins(run):
    succeed(run, "mode=eval", "resume=run", *MACHINE[:2], "metric=[average_precision,nsd]", "hydra.run.dir=stored")
    with np.load(run / "stored/counts.npz") as arrays:
        assert [*arrays] == ["classes", "nsd/pairs"]


def test_comparison_and_its_page_have_the_metrics_of_both_runs(run):
    words = ("mode=eval", "resume=run", *MACHINE[:2], "resolution.scale=0.5", "hydra.run.dir=half")
    succeed(run, *words)
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
        ("_target_: dinoseg.metrics.BoundaryIoU", "`_target_` and its arguments are below the key NAME:"),
    ],
)
def test_a_metric_file_with_another_key_is_explained(text, message, tmp_path):
    write_data(tmp_path / "data")
    write_text(tmp_path / "mine/metric/other.yaml", text)
    words = ("--config-dir", str(tmp_path / "mine"), "mode=train", *SMALL, "metric=[other]", "trainer.score=other")
    done = call(tmp_path, *words)
    assert done.status == 1 and message in done.err


@pytest.mark.heavy
def test_resuming_by_another_score_or_option_discards_the_best(run, tmp_path):
    for number, words in enumerate(("trainer.score=ece", "metric.boundary_iou.ratio=0.2")):
        copy = tmp_path / str(number)
        shutil.copytree(run / "run", copy)
        done = call(run, "mode=train", f"resume={copy}", *MACHINE, "trainer.steps=7", words)
        assert done.status == 0 and "Checkpoint selection changed to" in done.err, done.err


@pytest.mark.heavy
def test_other_classes_of_a_second_score_discard_the_best(tmp_path):
    write_data(tmp_path / "data")
    words = ("trainer.score=skeleton_recall", "metric=[cldice]", "mode.metrics_only=true", "hydra.run.dir=run")
    succeed(tmp_path, "mode=train", *SMALL, *words, "logger=[]")
    length = (*MACHINE, "trainer.steps=3", "mode.metrics_only=true")
    done = call(tmp_path, "mode=train", "resume=run", *length, "metric.cldice.classes=[0]")
    assert done.status == 0 and "to skeleton_recall classes=[0] of all images" in done.err, done.err


@pytest.mark.heavy
def test_auto_resume_takes_a_run_of_other_scores(tmp_path):
    write_data(tmp_path / "data")
    words = ("mode=train", *SMALL, "resume=auto", "logger=[]", "hydra.run.dir=run", "mode.metrics_only=true")
    succeed(tmp_path, *words)
    done = call(tmp_path, *words, "metric=nsd", "trainer.score=nsd", "trainer.steps=3")
    assert done.status == 0 and "resuming" in done.err, done.err
    assert checkpoint.describe(tmp_path / "run/checkpoints/last.safetensors")["choices"]["metric"] == ["nsd"]


WITH = ("sarrarp", "person", "binary", "pascal_voc", "davis2016", "davis2017", "movi", "youtube_vos", "videos")
WITHOUT = ("camvid", "camvid_segnet", "cityscapes", "idd", "idd_lite", "idd_level1", "idd_cityscapes", "ade20k")


@pytest.mark.parametrize(("names", "expected"), [(WITH, 0), (WITHOUT, None)])
def test_shipped_data_sets(names, expected):
    register_resolvers()
    for name in names:
        build = Builder(OmegaConf.create({"data": {**read_whole("data", name), "root": "X"}, "choices": {}}))
        assert build.background == expected, name


def test_background_of_own_data_is_a_name_an_id_or_none(compose, tmp_path):
    folder = ("data=folder", f"data.root='{tmp_path}'")
    assert Builder(compose(*folder, "data.classes=[background,leaf]")).background is None
    assert Builder(compose(*folder, "data.classes=[leaf,soil]", "data.background=soil")).background == 1
    (tmp_path / "classes.yaml").write_text("classes: [leaf, soil]\nbackground: soil\n")
    assert Builder(compose(*folder)).background == 1
    (tmp_path / "classes.yaml").write_text("classes: [leaf, soil]\nbackground: sol\n")
    message = "classes.yaml: background: 'sol' is not a class: name one of leaf, soil"
    assert_refused(lambda: Builder(compose(*folder)).background, message)


@pytest.mark.parametrize(("value", "shown"), [(2, "2"), (-1, "-1"), (True, "true"), ("sky", "sky"), ("1", "'1'")])
def test_background_that_is_no_class_is_refused(value, shown):
    build = Builder(OmegaConf.create({"data": {"background": value, "classes": ["dark", "bright"]}, "choices": {}}))
    assert_refused(lambda: build.background, f"data.background={shown} is not a class", "0 to 1: dark, bright")


def test_scores_leave_out_the_background_if_there_is_one(run, tmp_path):
    assert "no_background" not in (run / "run/evaluation/scores.json").read_text()
    write_data(tmp_path / "data")
    words = ("data.background=bright", "trainer.score=miou_no_background", "hydra.run.dir=run")
    done = succeed(tmp_path, "mode=train", *SMALL, *BARE, *words)
    assert "without class 1, bright" in done.out and "mIoU without" in done.out
    assert [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "val/miou_no_background" in row]
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    best = checkpoint.describe(tmp_path / "run/checkpoints/best.safetensors")["progress"]["best"]
    assert scores["miou_no_background"] == scores["classes"][0]["iou"] == pytest.approx(best)


SURGICAL = ("sarrarp_frozen", "sarrarp_full", "sarrarp_lora_lowres", "dpt_sarrarp")


@pytest.mark.parametrize("name", ["sarrarp_lora", *(pytest.param(name, marks=pytest.mark.heavy) for name in SURGICAL)])
def test_surgical_recipes_follow_the_original(compose, name):
    trainer = compose(f"hparam={name}", "data.root=X").trainer
    assert trainer.score == "miou_no_background" and trainer.clip is None
