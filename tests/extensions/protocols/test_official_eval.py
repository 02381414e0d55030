"""mode=eval scores as the benchmark does: what it writes, scored again as files, gives the same."""

import json
import shutil
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from command_line import SMALL, call, link_all
from finished_runs import train_run
from making import save
from PIL import Image

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.extensions.protocols import folders
from dinoseg.extensions.protocols.idd_lite import IddLite
from dinoseg.extensions.protocols.official import OfficialScorer
from dinoseg.extensions.protocols.sar_rarp50 import SarRarp50
from dinoseg.modes import evaluate as evaluate_mode
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png


def noise(rng, high=255, shape=(32, 48, 3)):
    return rng.integers(0, high, shape).astype(np.uint8)


def enlarge(ids):
    return ids.repeat(8, axis=0).repeat(8, axis=1)


def write_sarrarp(root):
    rng = np.random.default_rng(0)
    for folder, videos in (("train1", (1, 2, 3)), ("test", ("41_1", "41_2", 42))):
        for video in videos:
            for frame in (0, 60):
                place = root / folder / f"video_{video}"
                write_png(place / f"rgb/{frame:09d}.png", noise(rng))
                write_png(place / f"segmentation/{frame:09d}.png", enlarge(noise(rng, 10, (4, 6))))


def write_idd_lite(root):
    rng = np.random.default_rng(0)
    for split, drives in (("train", "123"), ("val", "45")):
        for drive in drives:
            for frame in "ab":
                write_png(root / f"leftImg8bit/{split}/{drive}/{frame}_image.png", noise(rng))
                ids = rng.choice([0, 1, 2, 3, 4, 5, 6, 255], (32, 48)).astype(np.uint8)
                write_png(root / f"gtFine/{split}/{drive}/{frame}_label.png", ids)


def write_cityscapes(root):
    rng = np.random.default_rng(0)
    for split, city in (("train", "ulm"), ("val", "bonn")):
        for number in range(2):
            start = f"{split}/{city}/{city}_{number:06}_000019"
            write_png(root / f"leftImg8bit/{start}_leftImg8bit.png", noise(rng))
            ids = enlarge(noise(rng, 34, (4, 6)))
            write_png(root / f"gtFine/{start}_gtFine_labelIds.png", ids)
            instances = np.where((ids > 23) & (ids != 29) & (ids != 30), ids * np.uint16(1000) + 1, ids)
            save(root / f"gtFine/{start}_gtFine_instanceIds.png", instances, np.uint16)


RULES = {"sarrarp": write_sarrarp, "idd_lite": write_idd_lite, "cityscapes": write_cityscapes}
SMALLEST = [word for word in SMALL if not word.startswith(("data=", "data.classes", "trainer.steps"))]


def train_model(folder, data):
    """Write a tiny benchmark to data/ and a model of it to run/."""
    RULES[data](folder / "data")
    words = ("mode=train", f"data={data}", *SMALLEST, "trainer.steps=1", "mode.metrics_only=true", "mode.report=false")
    train_run(folder, "run", *words)
    return folder


@pytest.mark.parametrize(
    ("data", "split", "reference", "unit"),
    [
        pytest.param("sarrarp", "test", "test", 2, marks=pytest.mark.heavy),  # operations, of three videos
        pytest.param("idd_lite", "val", "gtFine/val", 2, marks=pytest.mark.heavy),
        ("cityscapes", "val", "gtFine/val", 1),  # a city
    ],
)
def test_the_official_scores_of_an_evaluation(tmp_path, request, data, split, reference, unit):
    if data == "cityscapes":
        link_all(request.getfixturevalue("cityscapes_run"), tmp_path)
    else:
        train_model(tmp_path, data)
    only = ("mode.metrics_only=true",) if data == "idd_lite" else ()
    done = call(tmp_path, "mode=eval", "resume=run", f"mode.split={split}", "engine=cpu", "hydra.run.dir=eval", *only)
    assert done.status == 0 and "official:" in done.out, done.err
    official = json.loads((tmp_path / "eval/official_scores.json").read_text())
    words = ["protocol=sar_rarp50" if data == "sarrarp" else f"protocol={data}", "hydra.run.dir=again"]
    again = call(tmp_path, "mode=score", *words, f"reference=data/{reference}", "prediction=eval/official")
    assert again.status == 0, again.err
    scored = json.loads((tmp_path / "again/scores.json").read_text())
    for key in ("scores", "ci95", "protocol", "n"):
        assert official[key] == scored[key], key
    assert official["n"] == unit == len({*json.loads((tmp_path / "eval/evaluation.json").read_text())["units"]})
    assert all(value is None or 0 <= value <= 1 for value in official["scores"].values())
    if data == "sarrarp":
        quick = ("mode.official=false", "mode.metrics_only=true", "hydra.run.dir=plain")
        without = call(tmp_path, "mode=eval", "resume=run", "engine=cpu", *quick)
        assert without.status == 0 and not (tmp_path / "plain/official").exists()


@pytest.fixture(scope="module")
def cityscapes_run(tmp_path_factory):
    return train_model(tmp_path_factory.mktemp("cityscapes"), "cityscapes")


@pytest.fixture
def evaluate(cityscapes_run, tmp_path):
    """Return a function that evaluates it on a copy of the data, and returns what it printed and wrote."""
    shutil.copytree(cityscapes_run / "data", tmp_path / "data")

    def run(*words):
        folder = f"eval_{len(list(tmp_path.glob('eval_*')))}"
        fixed = ("engine=cpu", "mode.metrics_only=true", f"resume={cityscapes_run}/run", f"hydra.run.dir={folder}")
        done = call(tmp_path, "mode=eval", *fixed, f"data.root={tmp_path}/data", *words)
        written = {path.name: json.loads(path.read_text()) for path in (tmp_path / folder).glob("*.json")}
        assert done.status == 0 and 0 <= written["scores.json"]["miou"] <= 1, done.err
        return done.out + done.err, written, tmp_path / folder

    return run


def test_missing_instances_skip_only_the_official_scores(evaluate, tmp_path):
    lost = "bonn_000001_000019_gtFine_instanceIds.png"
    (tmp_path / f"data/gtFine/val/bonn/{lost}").unlink()
    text, written, folder = evaluate()
    assert "No official scores" in text and lost in text and "iIoU needs it" in text
    assert [row["file"].endswith(lost) for row in written["problems.json"]["problems"]] == [True]
    assert "official_scores.json" not in written
    assert not (folder / "official").exists()  # it was told before the model was run
    text, written, folder = evaluate("data.on_error=skip")
    assert "No official scores" not in text and "problems.json" not in written
    assert written["official_scores.json"]["n"] == 1 and len(written["official_scores.json"]["problems"]) == 1


def test_unreadable_reference_skips_only_the_official_scores(evaluate, tmp_path):
    bad = tmp_path / "data/gtFine/val/bonn/bonn_000000_000019_gtFine_instanceIds.png"
    bad.write_bytes(b"no picture")
    text, written, folder = evaluate()
    assert "No official scores" in text and len(list((folder / "official").rglob("*.png"))) == 2
    assert [row["file"] for row in written["problems.json"]["problems"]] == [str(bad)]


@pytest.mark.heavy
def test_size_mismatch_with_the_reference_is_reported_first(evaluate, tmp_path):
    for split in ("train", "val"):  # either is packed as it is
        text, written, _ = evaluate(f"mode.split={split}", "data.cache=packed", "resolution.longest=24")
        assert len(written["official_scores.json"]["per_image"]) == 2 and "No official scores" not in text
    for kind in ("labelIds", "instanceIds"):
        path = tmp_path / f"data/gtFine/val/bonn/bonn_000000_000019_gtFine_{kind}.png"
        Image.open(path).resize((24, 16), Image.Resampling.NEAREST).save(path)
    resized = "data.reader.masks.on_size_mismatch=resize_mask"
    text, written, folder = evaluate(resized)
    assert "is 24 x 16 (width x height)" in text and "prediction to 48 x 32" in text
    assert len(written["problems.json"]["problems"]) == 1 and not (folder / "official").exists()
    _, written, _ = evaluate(resized, "data.on_error=skip")
    assert written["official_scores.json"]["n"] == 1


def data_of(names, folder):
    """Return a data set of masks 6 x 4 (width x height) of one class."""
    for name in names:
        write_png(folder / f"{name}.png", np.zeros((4, 6), np.uint8))
    pairs = [Pair(name, folder / f"{name}.png", folder / f"{name}.png") for name in names]
    return PairDataset(pairs, Labels.of(["road"], None, 255), Masks())


def test_resizing_benchmark_accepts_any_size(tmp_path, caplog):
    data = data_of(["1/a", "1/b"], tmp_path / "data")
    data.longest = 3
    assert OfficialScorer(IddLite(), tmp_path / "out").can_score(data, warns=True) and not caplog.records
    assert not OfficialScorer(SarRarp50(), tmp_path / "out").can_score(data, warns=False) and not caplog.records
    assert not OfficialScorer(SarRarp50(), tmp_path / "out").can_score(data, warns=True)
    assert "prediction to 3 x 2" in caplog.text and (tmp_path / "out/problems.json").is_file()


@pytest.mark.parametrize("is_main", [True, False])
def test_the_first_rank_alone_scores_and_warns(tmp_path, monkeypatch, is_main):
    for name in ("check_score_names", "check_classes", "MetricRows"):
        monkeypatch.setattr(evaluate_mode, name, Mock())
    for name in ("load_trained", "provenance_of", "list_skipped"):
        monkeypatch.setattr(evaluate_mode, name, Mock())
    monkeypatch.setattr(evaluate_mode, "evaluate_images", lambda *_, **__: {"miou": 0.5})
    evaluate_mode.load_trained.return_value.engine.is_main = is_main
    benchmark = MagicMock()
    options = {"metrics_only": True, "official": True, "report": False, "scorer": lambda *_: benchmark}
    options["regions"] = None
    builder = Mock(checkpoints=["best"], metrics=[])
    builder.with_metrics.return_value = builder
    scores = evaluate_mode.evaluate_split(builder, tmp_path, "val", **options)
    assert benchmark.can_score.call_args.kwargs == {"warns": is_main}
    assert benchmark.score.called == is_main == ("official" in scores)


def test_names_outside_the_benchmark_are_reported(tmp_path, caplog):
    scorer = OfficialScorer(SarRarp50(), tmp_path / "out", "skip")
    assert not scorer.can_score(data_of(["a"], tmp_path / "data"), warns=True)
    assert "a is not a frame name of SAR-RARP50" in caplog.text


def test_failed_official_scores_leave_the_others(tmp_path, caplog, monkeypatch):
    data = data_of(["1/a", "1/b"], tmp_path / "data")
    assert OfficialScorer(IddLite(), tmp_path / "out", "skip").score(data) is None  # no prediction was written
    (row,) = json.loads((tmp_path / "out/problems.json").read_text())["problems"]
    assert "Nothing is left to score" in caplog.text and "Nothing is left to score" in row["reason"]

    def kill(*_, remedy, **__):
        raise UserError(f"A process was killed. {remedy}")

    monkeypatch.setattr(folders, "in_processes", kill)
    assert OfficialScorer(IddLite(), tmp_path / "out").score(data) is None
    folder = tmp_path / "out/official"
    assert f"A process was killed. Score these predictions separately: mode=score prediction={folder} " in caplog.text


def test_left_out_images_are_listed_at_the_end(tmp_path):
    write_idd_lite(tmp_path / "data")
    (tmp_path / "data/leftImg8bit/train/1/a_image.png").write_bytes(b"no picture")
    words = ["mode=train", "data=idd_lite", *SMALLEST, "trainer.steps=1", "mode.metrics_only=true"]
    stopped = call(tmp_path, *words, "hydra.run.dir=stopped")
    assert stopped.status == 1 and "1/a" in stopped.err and "The dataset has errors" in stopped.err
    _, done = train_run(tmp_path, "run", *words, "data.on_error=skip")
    assert "left out:     1 image," in done.out
    left_out = json.loads((tmp_path / "run/skipped.json").read_text())
    assert list(left_out["train"]) == ["1/a"] and not left_out["val"]
    assert "1/a" not in json.loads((tmp_path / "run/split.json").read_text())["train"]
