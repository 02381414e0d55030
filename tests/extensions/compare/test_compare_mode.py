import csv
import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import call, succeed, write_data
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.checkpoints.run_config import open_saved_data
from dinoseg.evaluation.collected import image_mious
from dinoseg.evaluation.image_record import COUNTS, RECORD, find_evaluation, read_record
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.compare.compare_mode import run_rows
from dinoseg.extensions.compare.comparison import against
from dinoseg.extensions.compare.sides import describe_seeds, sides_of
from dinoseg.modes import evaluate
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

STATES = ("uncalibrated", "at temperature")
EVAL = ("mode=eval", "engine=cpu", "engine.workers=0")


@pytest.fixture(scope="module")
def runs(trained):
    """Two evaluations of one model, the second with half the resolution."""
    for name, words in (("first", ()), ("second", ("resolution.scale=0.5",))):
        succeed(trained, *EVAL, "resume=segmenter", f"hydra.run.dir={name}", *words)
    return trained


def compare(runs, *folders, status=0):
    """Compare runs, anew; return the command's end and, if it worked, compare.json."""
    shutil.rmtree(runs / "compared", ignore_errors=True)
    done = call(runs, "mode=compare", f"runs=[{','.join(folders)}]", "hydra.run.dir=compared")
    assert done.status == status, done.err
    return done, None if status else json.loads((runs / "compared/compare.json").read_text())


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def compare_sides(runs, compose, monkeypatch, caplog):
    """Return a function that holds sides against the first as mode=compare does, and returns both and what is told."""
    monkeypatch.chdir(runs)
    cfg = compose("mode=compare", "runs=[a,b]")

    def hold(*given):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            sides = sides_of([*given])
            first = sides[0].records[0]
            open_data = partial(open_saved_data, Builder(cfg), root=first.root, split=first.split)
            others = against(sides, open_data)
        return sides, others, caplog.text

    return hold


def copy_run(runs, base, name):
    folder = runs / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs / base, folder)
    return folder


def copy_second_run(runs, name, change=lambda record: None):
    """Copy the second run, with its record changed."""
    folder = copy_run(runs, "second", name)
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_two_runs_are_compared(runs):
    done, found = compare(runs, "first", "second")
    scores = [json.loads((runs / name / "scores.json").read_text())["miou"] for name in ("first", "second")]
    assert found["scores"]["miou"] == pytest.approx(scores[0])
    assert found["others"]["second"]["differences"]["miou"]["value"] == pytest.approx(scores[1] - scores[0])
    rows = rows_of(runs / "compared/compare.csv")
    called = ["mIoU", "mean Dice", "pixel accuracy", "IoU dark", "IoU bright"]  # as on the page; keys in compare.json
    assert [row["score"] for row in rows] == called and all(name in done.out for name in called)
    assert [*found["scores"]] == ["miou", "dice", "accuracy", "iou/0", "iou/1"]
    parts = [f"second {part}" for part in ("difference", "low", "high", "p", "verdict")]
    assert [*rows[0]] == ["score", "first", "second", *parts]
    assert float(rows[0]["second"]) == pytest.approx(scores[1])
    assert float(rows[0]["second difference"]) == pytest.approx(scores[1] - scores[0])
    assert "intervals are over 2 images: with fewer than 10" in done.err
    ranked = rows_of(runs / "compared/runs.csv")
    assert [float(row["miou"]) for row in ranked] == pytest.approx(sorted(scores, reverse=True))
    cost = json.loads((runs / "segmenter/cost.json").read_text())
    sizes = {(int(row["parameters"]), int(row["trainable"])) for row in ranked}
    assert sizes == {(cost["parameters"], cost["trainable"])}
    assert [float(row["seconds"]) for row in ranked] == pytest.approx([1 / cost["images_per_s"]] * 2)
    assert f"{cost['parameters']:,}" in done.out
    page = (runs / "compared/report.html").read_text()
    assert "second against first" in page and page.count("<img") >= 5 and "IoU bright" in done.out


def test_groups_without_labels_are_in_no_interval(runs):
    for name, ignored in (("a_1", False), ("a_2", True), ("b_1", False), ("void_1", True)):
        image = np.random.default_rng(len(name)).integers(0, 256, (32, 48, 3)).astype(np.uint8)
        mask = np.where(ignored, 255, image.mean(axis=-1) > 127)
        write_png(runs / f"grouped/val/images/{name}.png", image)
        write_png(runs / f"grouped/val/masks/{name}.png", mask.astype(np.uint8))
    words = ("data.root=grouped", "data.group='^[a-z]+'", "mode.metrics_only=true")
    done = call(runs, *EVAL, "resume=segmenter", "hydra.run.dir=few", *words)
    assert done.status == 0 and "over 2 groups" in (runs / "few/report.html").read_text(), done.err
    copy_run(runs, "few", "again_few")
    done, found = compare(runs, "few", "again_few")
    assert "intervals:    over 2 groups" in done.out and "over 2 groups: with fewer" in done.err
    assert found["units"] == 2


def of_seed(runs, base, name, seed):
    """Copy an evaluation as that of another seed, with other predictions."""
    folder = copy_run(runs, base, name)
    config = OmegaConf.load(folder / "config/config.yaml")
    config.seed = seed
    if seed:
        config.data.root = str(runs / "a copy")  # which makes no other recipe
    OmegaConf.save(config, folder / "config/config.yaml")
    with np.load(folder / COUNTS) as file:
        counts = file["classes"]
    counts[:, 0] = counts[:, 0] * (9 - seed) // 9
    np.savez(folder / COUNTS, classes=counts)


def test_runs_that_differ_in_their_seed_alone_are_one_side(runs, compare_sides):
    sweep = runs / "sweep"
    (sweep / "4").mkdir(parents=True)
    (sweep / "multirun.yaml").write_text("")
    for number, base in enumerate(("first", "second", "first", "second")):
        of_seed(runs, base, f"sweep/{number}", number // 2)
    done, found = compare(runs, "sweep")
    assert found["sides"] == {"0+2": ["sweep/0", "sweep/2"], "resolution.scale=0.5": ["sweep/1", "sweep/3"]}
    mious = [np.mean([_miou(runs / f"sweep/{number}") for number in side]) for side in ((0, 2), (1, 3))]
    assert found["others"]["resolution.scale=0.5"]["differences"]["miou"]["value"] == pytest.approx(mious[1] - mious[0])
    assert "sweep: folders that are no jobs with an evaluation of images are left out: 4." in done.err
    assert "the variance over seeds is included in the intervals (2, 2 runs)" in done.out
    assert (runs / "compared/compare.csv").is_file()
    assert sorted(row["run"] for row in rows_of(runs / "compared/runs.csv")) == ["0", "1", "2", "3"]
    names = ["image", "unit", "0+2", "resolution.scale=0.5", "resolution.scale=0.5 adds"]
    assert [*rows_of(runs / "compared/images.csv")[0]] == names
    sides, _, said = compare_sides("sweep/0", "sweep/2")  # of seeds alone each stands for itself
    assert "one trained model per side" in describe_seeds(sides) and "differ only in their seed" in said
    copy_run(runs, "sweep/0", "again")  # of the same seed: another evaluation is what is compared
    sides = sides_of(["sweep/0", "sweep/1", "again"])
    assert [side.name for side in sides] == ["0", "resolution.scale=0.5", "again"]
    assert "one trained model per side" in describe_seeds(sides)
    jobs = sides_of(["sweep/2", "sweep"])[0].folders  # what is named before its sweep comes first
    assert jobs == [Path("sweep/2"), Path("sweep/0")]


def _miou(folder):
    counts = read_record(folder).counts.sum(axis=0)
    return np.mean(counts[0] / (counts[1] + counts[2] - counts[0]))


def test_every_list_of_runs_is_a_side(runs, compare_sides):
    for seed in (0, 1):
        of_seed(runs, "first", f"a{seed}", seed)
    said = compare_sides(["a0", "second"], "a1")[-1]
    assert "a0, second are one side, but differ in more than seed and fold: resolution.scale" in said
    copy_run(runs, "a0", "again")  # another seed by the user's list alone
    said = compare_sides(["a0", "again", "a1"], "second")[-1]
    assert "a0, again are one side, but have the same settings, seed and fold" in said


def test_costs_in_a_run_folder_are_listed(runs):
    costs = {"parameters": 7_000_000, "trainable": 10, "images_per_s": 4.0, "memory_gib": None}
    path = runs / "second/cost.json"
    path.write_text(json.dumps(costs))
    rows = {row["run"]: row for row in run_rows(sides_of([runs / "first", runs / "second"]))}
    path.unlink()
    assert (rows["second"]["parameters"], rows["second"]["memory_gib"], rows["second"]["seconds"]) == (7e6, None, 0.25)
    trained = json.loads((runs / "segmenter/cost.json").read_text())
    assert rows["first"]["parameters"] == trained["parameters"]  # that of the evaluated checkpoint, from any folder


def test_every_evaluation_has_a_report_by_default(runs):
    page = (runs / "first/report.html").read_text()
    scores = json.loads((runs / "first/scores.json").read_text())
    assert f"<b>{100 * scores['miou']:.1f} %</b>" in page and "<h2>Training</h2>" in page
    rows = rows_of(runs / "first/images.csv")
    assert [row["image"] for row in rows] == ["0", "1"]
    assert sum(int(row["labelled_pixels"]) for row in rows) == scores["pixels"]
    wrong = sum(int(row["wrong_pixels"]) for row in rows)
    assert wrong == round((1 - scores["accuracy"]) * scores["pixels"])
    counts = read_record(runs / "first").counts
    record = json.loads((runs / "first" / RECORD).read_text())
    assert [float(row["miou"]) for row in rows] == pytest.approx(image_mious(counts)) and record["unit"] == "image"
    plain, scaled = (re.search(rf">{name}[^<]*</th><td[^>]*data-value=.([\d.e-]+)", page)[1] for name in STATES)
    assert float(scaled) < float(plain)  # negative log-likelihood, before and after the temperature
    done = call(runs, *EVAL, "resume=segmenter", "mode.report=false", "hydra.run.dir=bare")
    left = {path.name for path in (runs / "bare").iterdir()}
    assert done.status == 0 and not {"report.html", RECORD, COUNTS, "images.csv"} & left
    done, _ = compare(runs, "first", "bare", status=1)
    assert "mode.report=false" in done.err and "mode=eval resume=RUN" in done.err


def test_evaluations_of_different_images_are_refused(runs, monkeypatch, caplog):
    monkeypatch.chdir(runs)
    copy_second_run(runs, "other", lambda record: record.update(classes=["dark", "light"], split="test"))
    done, _ = compare(runs, "first", "other", status=1)
    assert "classes: dark, bright in the first; dark, light in the second" in done.err
    assert "split: val in the first; test in the second" in done.err
    copy_second_run(runs, "other")
    with np.load(runs / "second" / COUNTS) as file:
        np.savez(runs / "other" / COUNTS, classes=file["classes"] + 1)
    assert_refused(lambda: sides_of(["first", "other"]), "the references of 2 images differ: 0, 1")
    copy_second_run(runs, "other", lambda record: record.update(units=["0", "0"]))
    sides_of(["first", "other"])
    assert "other and first group images differently (data.group)" in caplog.text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (None, "runs=null names no run. Give at least two run folders"),
        ("first", "runs=first names 1 run. Give"),
        (["first", "first"], "first more than once. Give"),
        (["first", "nowhere"], "runs=nowhere: file or folder not found. Give run"),
        ([["first", "second"]], "runs=[[first,second]] makes 1 side. Give"),
        (["first", []], "runs=[first,[]] has a side without a separate run. Give"),
    ],
)
def test_fewer_than_two_runs_are_refused(runs, monkeypatch, asked, said):
    monkeypatch.chdir(runs)
    assert_refused(lambda: sides_of(asked), "run folders of mode=eval or mode=train", said)


def test_a_refused_comparison_leaves_no_folder(runs):
    done = call(runs, "mode=compare", "runs=[[first,second]]", "hydra.run.dir=refused")
    assert done.status == 1 and "runs=[[first,second]] " in done.err and not (runs / "refused").exists()


@pytest.mark.heavy
def test_there_are_at_most_32_sides(runs):
    sides = [[copy_run(runs, "first", f"side{number}")] for number in range(33)]
    assert len(sides_of(sides[:32])) == 32
    assert_refused(lambda: sides_of(sides), "makes 33 sides", "At most 32 sides")


def test_there_are_at_most_160_runs(tmp_path):
    folders = [str(tmp_path / str(number)) for number in range(161)]
    assert_refused(lambda: sides_of(folders), "names 161 runs", "and 160 runs can be compared")
    assert_refused(lambda: sides_of(folders[:160]), "0: file or folder not found")


def test_damaged_record_is_refused(runs):
    with pytest.raises(UserError, match=r"damaged evaluation\.json or counts\.npz .*Evaluate again"):
        read_record(copy_second_run(runs, "damaged", lambda record: record.pop("split")))
    for name, content in ((RECORD, b"{"), (COUNTS, b""), (COUNTS, (runs / "second" / COUNTS).read_bytes()[:200])):
        folder = copy_second_run(runs, "damaged")
        (folder / name).write_bytes(content)
        assert_refused(partial(read_record, folder), "damaged ")


def test_the_evaluation_at_the_end_of_a_training_is_one(runs):
    folder = runs / "segmenter/evaluation"
    page = (folder / "report.html").read_text()
    assert "mode=train" in page and "segmenter/checkpoints/best.safetensors" in page and "<h2>Training</h2>" in page
    tracked = (runs / "slots/evaluation/report.html").read_text()
    assert "mode=train" in tracked and "slots/checkpoints/best.safetensors" in tracked
    words = ("slots/evaluation is an evaluation of videos", "mode=score protocol=NAME ", "evaluation/masks,OTHER/masks")
    assert_refused(lambda: find_evaluation(runs / "slots"), *words)
    differences = compare(runs, "segmenter", "first")[1]["others"]["first"]["differences"]
    assert differences["miou"] == {"value": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "verdict": "no significant difference"}
    again = json.loads((runs / "first" / RECORD).read_text())
    kept = json.loads((folder / RECORD).read_text())
    assert Path(kept["source"]).is_absolute()
    assert Path(kept.pop("source")).resolve() == (runs / again.pop("source")).resolve() and kept == again


def test_unknown_split_is_refused_before_building_the_model(runs, monkeypatch):
    monkeypatch.setattr(evaluate, "load_trained", None)
    done = call(runs, *EVAL, "resume=segmenter", "mode.split=nope", "hydra.run.dir=refused")
    assert done.status == 1 and "split=nope is unknown. Choose one of train, val, test." in done.err


def test_predictions_of_unknown_classes_cost_only_the_images(runs, compare_sides):
    folder = copy_second_run(runs, "other")
    for path in (folder / "predictions").glob("*_pred.png"):
        write_png(path, np.full((32, 48), 7, np.uint8))
    assert "not a mask of the 2 classes" in compare_sides("first", "other")[-1]
    write_data(runs / "less", train=1, val=1)
    copy_second_run(runs, "other", lambda record: record.update(root=str(runs / "less")))
    assert "other was evaluated on 1, which its data no longer has" in compare_sides("other", "first")[-1]


def test_untrusted_config_costs_only_the_images(runs, compare_sides):
    config = copy_run(runs, "first", "hostile") / "config/config.yaml"
    config.write_text(config.read_text().replace("dinoseg.data.formats.folder", "os.path"))
    done, _ = compare(runs, "hostile", "second")
    assert "The report has no images: " in done.err and "os.path" in done.err
    config.unlink()
    assert "The report has no images" in compare_sides("hostile", "second")[-1]


def test_class_ids_that_others_are_read_as_cost_no_pictures(runs, compare_sides):
    folder = copy_second_run(runs, "read as")
    config = OmegaConf.load(folder / "config/config.yaml")
    config.data.reader.masks.ids = {11: 255}  # whose keys are numbers in YAML and text in a checkpoint
    OmegaConf.save(config, folder / "config/config.yaml")
    _, (other,), said = compare_sides("read as", "first")
    assert other.shots and "has no images" not in said


def test_config_with_a_class_file_still_shows_images(runs, compare_sides):
    copy_run(runs, "first", "typed")
    config = (runs / "segmenter/config/config.yaml").read_text()
    (runs / "typed/config/config.yaml").write_text(config)
    _, (other,), said = compare_sides("typed", "second")
    assert "${dinoseg.class_file:palette}" in config and other.shots and "has no images" not in said
    hidden = config.replace("${dinoseg.class_file:palette}", "${dinoseg.class_file:${oc.env:HOME}}")
    (runs / "typed/config/config.yaml").write_text(hidden)
    assert "is refused: saved configs set no key" in compare_sides("typed", "second")[-1]
