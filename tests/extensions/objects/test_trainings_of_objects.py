"""Trainings, evaluations and comparisons of tasks of objects count AP or PQ without being asked."""

import csv
import json

import pytest
from command_line import SMALL, call, succeed, write_data

from dinoseg.methods import images
from dinoseg.metrics.rows import MetricRows
from dinoseg.report.log import read_rows
from dinoseg.training import checkpoint
from dinoseg.utils.atomic import write_text

DATA = ("data=folder_instances", "data.background=dark", "trainer.val_every=2", "mode.metrics_only=true", "logger=[]")
HEAD = (
    "loss=mask_classification",
    "head=mask2former",
    "head.num_queries=6",
    "head.num_heads=4",
    "head.hidden_dim=64",
    "head.feedforward_dim=32",
)
WORDS = (
    "--config-dir",
    "own",
    *SMALL,
    *DATA,
    *HEAD,
    "head.drop_path=0",
    "backbone.arch.num_hidden_layers=4",
    "optim.optimizer.lr=1e-3",
)
CASES = {"instances": ("BrightestClass", "AP"), "segments": ("BrightestSegment", "PQ")}


def write_task(folder, name):
    target, score = CASES[name]
    text = f"_target_: known_objects.{target}\nclasses: ${{data.classes}}\nthings: [bright]\nscore: {score}\n"
    write_text(folder / f"own/task/{name}.yaml", text)


@pytest.mark.parametrize("name", CASES)
def test_the_best_checkpoint_is_chosen_by_the_score_of_the_task(tmp_path, name):
    score = CASES[name][1]
    write_data(tmp_path / "data", train=4, val=3)
    write_task(tmp_path, name)
    done = succeed(tmp_path, "mode=train", *WORDS, f"task={name}", "trainer.steps=6", "hydra.run.dir=run")
    values = [row[f"val/{score}"] for row in read_rows(tmp_path / "run/metrics.jsonl") if f"val/{score}" in row]
    progress = checkpoint.describe(tmp_path / "run/checkpoints/best.safetensors")["progress"]
    assert len(values) == 3 and progress["best"] == max(values) and f"val/{score} " in done.err
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    assert scores[score] == max(values) and {"found", "missed", "invented"} <= scores["classes"][1].keys()
    assert f"{score} %" in done.out and "invented" in done.out
    page = (tmp_path / "run/evaluation/report.html").read_text()
    assert "Objects by class" in page and "95 %:" in page
    with (tmp_path / "run/evaluation/images.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert all(int(row["objects_found"]) + int(row["objects_missed"]) == 1 for row in rows)
    again = ("mode=eval", "resume=run", "engine=cpu", "engine.workers=0", "--config-dir", "own", "hydra.run.dir=again")
    succeed(tmp_path, *again)
    found = json.loads((tmp_path / "again/scores.json").read_text())
    assert found[score] == scores[score] and found["classes"] == scores["classes"]
    succeed(tmp_path, *again[:-1], "resolution.scale=0.5", "hydra.run.dir=half")
    compared = call(tmp_path, "--config-dir", "own", "mode=compare", "runs=[run,half]", "hydra.run.dir=compared")
    assert compared.status == 0, compared.err
    # runs and sides are ranked by the score of objects
    tables = compared.out.split("\n\n")[:2]
    order = (
        ["run", "half"]
        if found[score] >= json.loads((tmp_path / "half/scores.json").read_text())[score]
        else ["half", "run"]
    )
    for table in tables:
        lines = table.splitlines()
        assert f"{score} %" in lines[0] and [line.split()[0] for line in lines[-2:]] == order
    page = (tmp_path / "compared/report.html").read_text()
    assert f"{score} of each side" in page and f"{score} of an image by itself" in page
    record = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    with (tmp_path / "compared/images.csv").open() as file:
        by_image = [float(row["run"]) for row in csv.DictReader(file)]
    assert len(by_image) == 3 and by_image == pytest.approx(record["image_scores"][score])
    gaps = json.loads((tmp_path / "compared/compare.json").read_text())["others"]["half"]["differences"]
    assert gaps[score]["value"] == pytest.approx(
        json.loads((tmp_path / "half/scores.json").read_text())[score] - max(values)
    )
    assert gaps[score]["ci95"] is not None


def test_trainer_score_overrides_that_of_the_task(tmp_path, monkeypatch):
    write_data(tmp_path / "data", train=2, val=2)
    write_task(tmp_path, "instances")
    # objects may be found where mIoU is not above that of one class
    known = {"matrix": [[90, 0], [10, 0]], "miou": 0.45, "accuracy": 0.9}
    monkeypatch.setattr(images, "evaluate_images", lambda *_, **__: known)
    words = ("task=instances", "trainer.score=miou", "mode.report=false", "hydra.run.dir=run")
    done = succeed(tmp_path, "mode=train", *WORDS, *words)
    assert "val/miou " in done.err
    assert "not better than" not in done.err
    assert "val/AP" in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.heavy
def test_cached_features_and_windows_find_the_same_objects(tmp_path):
    write_data(tmp_path / "data", train=2, val=3)
    write_task(tmp_path, "instances")
    words = ("mode=train", *WORDS, "task=instances", "mode.report=false", "adapter=frozen", "engine.precision=fp32")
    found = []
    for name, cache in (("plain", "off"), ("cached", "disk")):
        succeed(tmp_path, *words, "data.views=1", f"engine.cache={cache}", f"hydra.run.dir={name}")
        found.append([row["val/AP50"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "val/AP50" in row])
    assert found[0] == pytest.approx(found[1]) and len(found[0]) == 1
    again = ("mode=eval", "resume=plain", "engine=cpu", "engine.workers=0", "--config-dir", "own", "mode.report=false")
    scores = []
    for number, strategy in enumerate(("inference=whole", "inference=windows inference.size=[32,48]")):
        succeed(tmp_path, *again, *strategy.split(), f"hydra.run.dir={number}")
        scores.append(json.loads((tmp_path / f"{number}/scores.json").read_text()))
    assert scores[0]["classes"][1]["found"] == scores[1]["classes"][1]["found"]
    succeed(tmp_path, *again, "inference=windows", "inference.size=24", "hydra.run.dir=small")
    small = json.loads((tmp_path / "small/scores.json").read_text())["classes"][1]
    assert small["found"] + small["missed"] == 3


@pytest.mark.parametrize("metric", ["instance_ap", "panoptic_quality"])
def test_a_metric_of_objects_needs_a_task_of_objects(tmp_path, metric):
    write_data(tmp_path / "data")
    done = call(tmp_path, "mode=train", *SMALL, f"metric=[{metric}]")
    assert done.status == 1 and f"metric=[{metric}] compares objects, which task=semantic does not predict" in done.err


def test_objects_of_all_folds_are_scored_as_one_dataset(tmp_path, monkeypatch):
    write_data(tmp_path / "data", train=4, val=1)
    for path in (tmp_path / "data/val").rglob("0.png"):
        path.rename(path.with_name("4.png"))
    write_task(tmp_path, "instances")
    words = ("-m", "mode=train", *WORDS, "task=instances", "mode.report=false", "trainer.steps=2")
    folds = ("data.folds=2", "data.fold=0,1", "hydra.sweep.dir=folds", "hydra.mode=MULTIRUN")
    succeed(tmp_path, *words, *folds)
    counted = []
    add_scores = MetricRows.add_scores
    monkeypatch.setattr(MetricRows, "add_scores", lambda self, *given: (add_scores(self, *given), counted.append(self)))
    again = ("mode=eval", "engine=cpu", "engine.workers=0", "--config-dir", "own")
    for name, resume in (("first", "folds/0"), ("second", "folds/1"), ("pooled", "folds")):
        done = succeed(tmp_path, *again, f"resume={resume}", f"hydra.run.dir={name}")
    *apart, pooled = [rows.counts[0] for rows in counted]
    concatenated = [row for rows in apart for row in rows]
    assert len(apart) == 2 and len(pooled) == 5
    for row, other in zip(pooled, concatenated, strict=True):
        assert {key: each.tolist() for key, each in row.items()} == {key: each.tolist() for key, each in other.items()}
    scores = json.loads((tmp_path / "pooled/scores.json").read_text())
    assert scores["AP"] == counted[0].metrics[0].score(concatenated)["AP"] > 0
    assert f"out of fold: AP {100 * scores['AP']:.2f} % (95 % interval " in done.err and "), mIoU" in done.err
    twice = ("resume=[folds/0,folds/1,other]", "mode.ensemble.out_of_fold=true")
    succeed(tmp_path, *words[1:], "data.folds=2", "data.fold=1", "seed=1", "hydra.run.dir=other")
    done = succeed(tmp_path, *again, *twice, "hydra.run.dir=fused")  # objects of two runs of a fold are fused
    assert "out of fold: AP " in done.err
