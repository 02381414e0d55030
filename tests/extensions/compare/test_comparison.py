"""Records of evaluations held against one another, without a model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mistakes import assert_refused, refusals
from omegaconf import OmegaConf
from scipy import stats

from dinoseg.checkpoints.run_config import open_saved_data
from dinoseg.core.metric import LabelledImage, Metric, PredictedImage
from dinoseg.evaluation.image_record import RECORD, ImageRecord, read_record, write_record
from dinoseg.evaluation.scoring.intervals import UnitScore, estimate_difference, mean_of
from dinoseg.evaluation.unit_scores import further_scores, leave_units_out, metric_intervals
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.compare import comparison
from dinoseg.extensions.compare.alignment import align_records
from dinoseg.extensions.compare.compare_mode import COLUMNS, costs_table, result_tables, run_rows
from dinoseg.extensions.compare.comparison import (
    SHOWN,
    _pair_shot,
    against,
    largest_differences,
    mean_image_scores,
    scores_of,
    verdicts,
)
from dinoseg.extensions.compare.page import OtherRun
from dinoseg.extensions.compare.sides import (
    EvaluatedModels,
    Recipe,
    Side,
    _jobs,
    describe_seeds,
    describe_units,
    group_runs,
    read_recipes,
)
from dinoseg.metrics import BoundaryIoU, ClDice
from dinoseg.utils.images import write_png

IMAGES, CLASSES = 12, 3


class ForegroundShare(Metric):
    """Share of the pixels predicted as foreground, of which the lowest is taken as the best."""

    scores = {"share": "min"}

    def count(self, prediction, sample):
        return {"pixels": np.array([(prediction.ids != 0).sum(), prediction.ids.size])}

    def compute(self, sums):
        return {"share": sums["pixels"][..., 0] / sums["pixels"][..., 1]}


class Data(list):
    """Samples with the names and classes of a data set."""


def record(seed=0, **changes):
    """Return a record of the same references for every seed, and other predictions."""
    held = np.random.default_rng(7).integers(50, 99, (IMAGES, CLASSES))
    right = np.random.default_rng(seed).integers(1, 50, (IMAGES, CLASSES))
    counts = np.stack([right, held, held + 3], axis=1).astype(np.int64)
    names = [f"{index:02}" for index in range(IMAGES)]
    said = {"classes": ["a", "b", "c"], "palette": [(0, 0, 0)] * 3, "ignore_index": 255, "background": 0, "data": "x"}
    said |= {"root": "", "split": "val", "unit": "video", "images": names, "units": [name[0] for name in names]}
    return ImageRecord(**{**said, "source": "", "counts": counts, **changes})


def as_layers(found):
    """Return a record of the same counts as of layers, which also hold the labelled pixels of each class."""
    return replace(found, counts=np.concatenate([found.counts, np.full((IMAGES, 1, CLASSES), 400)], axis=1))


TWO = (Path("a"), Path("b"))  # folders of runs


def align(folders, *records):
    return align_records(dict(zip(folders, records, strict=True)))


def test_runs_of_two_tasks_are_refused_by_name(tmp_path):
    mixed = record(), as_layers(record(1))
    assert_refused(lambda: align(TWO, *mixed), "task: semantic in the first; multilabel in the second")
    layers = align(TWO, as_layers(record()), as_layers(record(1)))
    assert [found.task for found in layers] == ["multilabel"] * 2
    write_record(layers[0], tmp_path)
    assert read_record(tmp_path).task == "multilabel"


def find_data(place, name):
    """Return an empty data set."""
    return []


def sides(folders, records):
    """Return a side of each run."""
    return [Side(at.name, [at], [at.name], [at], [found]) for at, found in zip(folders, records, strict=True)]


def test_images_in_another_order_are_the_same_images(caplog):
    first = record()
    second = record(1)
    order = np.random.default_rng(0).permutation(IMAGES)
    names, units = ([each[index] for index in order] for each in (second.images, second.units))
    moved = replace(second, images=names, units=units, counts=second.counts[order], image_scores={"AP": order.tolist()})
    given = align(TWO, first, moved)
    assert np.array_equal(given[1].counts, second.counts) and "belong to" not in caplog.text
    assert given[1].image_scores == {"AP": [*range(IMAGES)]}
    other = against(sides(TWO, given), pytest.fail)[0]
    assert other.scores == scores_of([second]) and other.image_scores[0] != pytest.approx(scores_of([first])["miou"])
    right, held, predicted = second.counts[0].astype(float)
    assert other.image_scores[0] == pytest.approx((right / (held + predicted - right)).mean())
    assert other.no_pictures.startswith("No images: a run was evaluated with mode.metrics_only=true")


def store_and_read(**changes):
    write_record(record(**changes), Path())
    read_record(Path())


def test_images_with_the_largest_differences_are_shown(tmp_path):
    folders = (tmp_path / "a", tmp_path / "b")
    gaps = [0.0, 0.1, -0.2, 0.3, None, -0.5, 0.02, 0.01, -0.01, 0.45, -0.03, 0.0, 0.04, -0.3]
    first = [None if gap is None else 0.5 for gap in gaps]
    pairs = dict.fromkeys(map(str, range(len(gaps))), folders)
    data = Data({"image": torch.zeros(3, 1, 1), "mask": torch.zeros(1, 1)} for _ in gaps)
    data.names, data.classes, data.ignore_index = [*pairs], ["a", "b"], 255
    for folder in folders:
        for name in pairs:
            write_png(folder / f"predictions/{name}_pred.png", np.zeros((1, 1), np.uint8))
    second = [None if gap is None else 0.5 + gap for gap in gaps]

    def find_shots(*given):
        shots, reason = largest_differences(lambda place, name: data, pairs, *given)
        assert not reason
        return [(int(shot.name), shot.scores) for shot in shots]

    shots = find_shots(first, second)
    gained = sorted([gap for gap in gaps if gap and gap > 0])[-SHOWN:]
    lost = sorted([gap for gap in gaps if gap and gap < 0])[:SHOWN]
    assert [gaps[index] for index, _ in shots] == sorted([*gained, *lost], key=abs, reverse=True)
    better = [0.2 + 0.01 * index for index in range(9)]
    assert len(find_shots([0.1] * 9, better)) == SHOWN
    for others, each in ((7, 4), (8, 3), (14, 2), (15, 1), (31, 1)):  # a page of many sides is no larger
        few = find_shots([0.5] * 12, [0.5 + 0.01 * gap for gap in range(-6, 6)], others)
        assert [index for index, _ in few if index < 6] == [*range(each)] and len(few) == 2 * each
    assert all(after - before == pytest.approx(gaps[index]) for index, (before, after) in shots)


def test_images_show_the_first_run_and_the_other(tmp_path, monkeypatch):
    asked = []
    folders = [tmp_path / name for name in "abc"]
    monkeypatch.setattr(comparison, "largest_differences", lambda load, folders, *_: asked.append(folders) or ([], ""))
    against(sides(folders, [record(seed) for seed in range(3)]), pytest.fail)
    assert [{*pairs.values()} for pairs in asked] == [{(folders[0], folders[1])}, {(folders[0], folders[2])}]


@pytest.mark.parametrize("out_of_fold", [True, False])
def test_only_out_of_fold_images_are_searched_in_train(tmp_path, monkeypatch, out_of_fold):
    asked = []

    def open_data(place, **split):
        asked.append(split)
        return SimpleNamespace(names=["of val"])

    def show(load, *_):
        load(tmp_path, "of train")
        return [], ""

    monkeypatch.setattr(comparison, "read_ensemble", lambda place: EvaluatedModels(2, out_of_fold))
    monkeypatch.setattr(comparison, "largest_differences", show)
    against(sides([tmp_path / "a", tmp_path / "b"], [record(), record(1)]), open_data)
    assert asked == [{}, {"split": "train"}][: 1 + out_of_fold]


def test_unreadable_data_is_opened_and_reported_once(tmp_path, caplog):
    folders = [tmp_path / name for name in "abcd"]
    opened = []
    for folder in folders:
        (folder / "predictions").mkdir(parents=True)
    (tmp_path / "a/config").mkdir()
    (tmp_path / "a/config/config.yaml").touch()

    def load(place):
        opened.append(1)
        return open_saved_data(Builder(OmegaConf.create({"trust": []})), place, root="", split="val")

    others = against(sides(folders, [record(seed) for seed in range(4)]), load)
    assert len(opened) == 1 and caplog.text.count("The report has no images: ") == 1
    assert all("config.yaml does not define the dataset" in other.no_pictures for other in others)


def show_image_outside():
    write_png("outside_pred.png", np.zeros((4, 6), np.uint8))
    Path("a/predictions").mkdir(parents=True)
    data = Data([{"mask": torch.zeros(4, 6)}])
    data.names, data.classes = ["../../outside"], ["a", "b"]
    _pair_shot(data, data.names[0], (Path("a"), Path("a")), (0.0, 1.0))


def align_to(**changes):
    return lambda: align(TWO, record(), record(1, **changes))


DIFFER = "were not evaluated on the same images"
OF_TWO = ("evaluation.json and counts.npz", "are of two evaluations")
test_message_names_value_and_remedy = refusals(
    {
        "a name that leads out": (show_image_outside, "names an image outside its own folder"),
        "background": (align_to(background=None), DIFFER, "- background: 0 in the first; None in the second\n"),
        "ignore_index": (align_to(ignore_index=250), DIFFER, "- ignore_index: 255 in the first; 250 in the second\n"),
        "an image": (
            align_to(images=[*record().images[1:], "x"]),
            DIFFER,
            "- 1 image only in the first (data=x, x): 00\n",
        ),
        "counts of fewer images": (lambda: store_and_read(counts=record().counts[1:]), *OF_TWO),
        "counts of fewer classes": (lambda: store_and_read(counts=record().counts[:, :, 1:]), *OF_TWO),
    }
)


def metric_scores(metric, seed, names, units):
    """Return the scores of a metric on random images, and the counts of each image."""
    found = []
    for name in names:
        rng = np.random.default_rng([seed, int(name)])
        mask = np.random.default_rng(int(name)).integers(0, CLASSES, (16, 18)).astype(np.uint8)
        ids = np.where(rng.random(mask.shape) < 0.1 * (seed + 1), 0, mask).astype(np.uint8)
        found.append(metric.count(PredictedImage(ids), LabelledImage(mask, CLASSES)))
    return further_scores(metric, leave_units_out(metric, found, units)), found


@pytest.mark.parametrize("metric", [ClDice(), ForegroundShare()])
def test_further_scores_are_paired_by_unit(tmp_path, metric):
    base = record(units=[f"{index // 3}" for index in range(IMAGES)])
    order = np.random.default_rng(1).permutation(IMAGES)
    names, units = ([each[index] for index in order] for each in (base.images, base.units))
    first, rows = metric_scores(metric, 0, base.images, base.units)
    second, _ = metric_scores(metric, 3, names, units)
    write_record(replace(base, images=names, units=units, counts=base.counts[order], scores=second), tmp_path)
    given = align(TWO, replace(base, scores=first), read_record(tmp_path))
    (other,) = against(sides(TWO, given), list)
    name = next(iter(metric.scores))
    gap = other.differences[name]
    others = metric_scores(metric, 3, base.images, base.units)[1]
    kept = [[unit != left for unit in base.units] for left in [None, *dict.fromkeys(base.units)]]
    values = [
        [metric.score(row for row, keep in zip(counts, keeps, strict=True) if keep)[name] for keeps in kept]
        for counts in (rows, others)
    ]
    gaps = np.subtract(values[1], values[0])
    freedom = len(gaps) - 2
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(freedom / (freedom + 1) * ((gaps[1:] - gaps[1:].mean()) ** 2).sum())
    assert scores_of([given[0]])[name] == pytest.approx(values[0][0])
    assert gap["value"] == pytest.approx(gaps[0])
    assert gap["ci95"] == pytest.approx([gaps[0] - reach, gaps[0] + reach])
    assert gap["verdict"] == ("significantly worse" if metric.scores[name] == "max" else "significantly better")
    assert name in verdicts(Side("a", [], [], [], [given[0]]), [other])
    assert [*scores_of([given[0]])][:5] == ["miou", "miou_no_background", "dice", "accuracy", name]


def test_videos_without_a_labelled_pixel_are_no_units(tmp_path):
    labelled = IMAGES - 3
    units = [f"{index // 3}" for index in range(IMAGES)]

    def compare_two(count):
        given = {}
        for seed in (0, 1):
            run = record(seed, units=units)
            run.counts[labelled:] = 0
            kept = {"images": run.images[:count], "units": units[:count], "counts": run.counts[:count]}
            score = metric_scores(ClDice(), seed, run.images[:labelled], units[:labelled])[0]["cldice"]
            if count > labelled:  # without the last video, the score is the same
                score = replace(score, left_out=[*score.left_out, score.value], scored=[*score.scored, False])
            given[tmp_path / f"{seed}"] = replace(run, **kept, scores={"cldice": score})
        two = sides([*given], align_records(given))
        return against(two, list)[0].differences, describe_units(two)

    found = compare_two(IMAGES)
    assert found == compare_two(labelled) and found[1] == "over 3 videos"
    assert all(found[0][key]["ci95"] for key in ("miou", "cldice"))


class RareRecall(ForegroundShare):
    """Recall of a class that few images have."""

    scores = {"rare": "max"}

    def count(self, prediction, sample):
        return {"pixels": np.array([((prediction.ids == 2) & (sample.mask == 2)).sum(), (sample.mask == 2).sum()])}

    def compute(self, sums):
        return {"rare": super().compute(sums)["share"]}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_images_without_a_rare_class_do_not_narrow_its_interval():
    metric = RareRecall()
    units = [f"{index}" for index in range(IMAGES)]

    def count(seed, images):
        rng = np.random.default_rng(seed)
        masks = [np.full((9, 9), 2 if index < 3 else 1) for index in range(images)]
        ids = [np.where(rng.random(mask.shape) < 0.3, 0, mask) for mask in masks]
        pairs = zip(ids, masks, strict=True)
        return [metric.count(PredictedImage(predicted), LabelledImage(mask, 3)) for predicted, mask in pairs]

    def difference(images):
        sides = [
            [further_scores(metric, leave_units_out(metric, count(seed, images), units[:images]))["rare"]]
            for seed in (0, 1)
        ]
        return estimate_difference(*sides)

    intervals = [
        metric_intervals(metric, leave_units_out(metric, count(0, images), units[:images])) for images in (3, IMAGES)
    ]
    assert intervals[0] == intervals[1] and intervals[0]["rare"]
    assert difference(3) == difference(IMAGES) and difference(3).ci95


def runs_of(*values):
    """Return runs of a score over a single unit."""
    return [UnitScore(value, [None], [True]) for value in values]


def test_a_single_unit_has_the_error_of_its_runs():
    first, second = (0.2, 0.3, 0.5), (0.6, 0.8)
    seeds = [[mean_of(values)] for values in (first, second)]
    gap = estimate_difference(runs_of(*first), runs_of(*second), seeds)
    expected = stats.ttest_ind(second, first, equal_var=False)
    assert gap.value == pytest.approx(0.7 - 1 / 3) and gap.p == pytest.approx(expected.pvalue)
    assert estimate_difference(runs_of(*first), runs_of(0.6), [seeds[0], []]).ci95 is None
    assert np.mean([0.1] * 3) != np.mean([0.1] * 2)  # in the last digit
    assert estimate_difference(runs_of(0.1, 0.1, 0.1), runs_of(0.1, 0.1)).value == 0


def test_scores_unbounded_or_of_other_settings_are_no_rivals(caplog):
    metric = ForegroundShare()
    base = record()
    metric.unbounded = ("share",)
    assert metric_scores(metric, 0, base.images, base.units)[0] == {}
    wide, narrow = (metric_scores(BoundaryIoU(ratio), 0, base.images, base.units)[0] for ratio in (0.2, 0.02))
    found = align(TWO, replace(base, scores=wide), replace(base, scores=narrow))
    assert [dict(run.scores) for run in found] == [{}, {}] and "boundary_iou" in caplog.text


def test_notes_state_the_runs_and_units_per_side():
    def of(*counts, units=("0", "1")):
        found = [record(units=[units[index % len(units)] for index in range(IMAGES)])]
        return [Side(name, [Path()] * runs, [], [], found) for name, runs in zip("abc", counts, strict=False)]

    assert describe_seeds(of(1, 1)).startswith("one trained model per side: ")
    assert describe_seeds(of(3, 2)) == "the variance over seeds is included in the intervals (3, 2 runs)"
    assert describe_seeds(of(2, 1, 2)).endswith("(2, 1, 2 runs), except for b, one trained model each")
    none = describe_units(of(1, 2, 2, units=["0"]))
    assert none.startswith("none: they need two videos, or several seeds") and "resume=RUN data.group=" in none
    of_seeds = "over seeds only: there is one video, so they do not generalise to others"
    assert describe_units(of(2, 2, units=["0"])) == of_seeds and describe_units(of(2, 1, 2)) == "over 2 videos"


def test_each_side_has_a_line_and_the_best_is_first(tmp_path):
    better, worse, same = "significantly better", "significantly worse", "no significant difference"
    said = {"a": (0.6, better, better, same), "b": (None, same, same, same), "c": (0.1, worse, worse, better)}
    said["d"] = (0.7, same, worse, worse)
    first = sides([tmp_path / "first"], [record()])[0]
    others = []
    for name, (miou, *verdicts_of) in said.items():
        gap = {"value": miou and miou - 0.5, "ci95": miou and [miou - 0.6, miou - 0.4], "p": miou and 0.01}
        gaps = {f"iou/{index}": {**gap, "verdict": verdict} for index, verdict in enumerate(verdicts_of)}
        means = dict.fromkeys(("miou", "miou_no_background", "dice", "accuracy"), {**gap, "verdict": verdicts_of[0]})
        scores = dict.fromkeys((*means, *gaps), miou)
        others.append(OtherRun(name, scores, [], means | gaps, [], []))
    own = 100 * scores_of([record()])["miou"]
    lines = [line.split() for line in verdicts(first, others).splitlines()[3:]]
    assert lines == [
        ["d", "70.00", "+20.00", "+10.00", "..", "+30.00", "0.01", "no", "significant", "difference", "0", "2"],
        ["a", "60.00", "+10.00", "+0.00", "..", "+20.00", "0.01", "significantly", "better", "2", "0"],
        ["first", f"{own:.2f}", "-", "-", "-", "the", "first"],
        ["c", "10.00", "-40.00", "-50.00", "..", "-30.00", "0.01", "significantly", "worse", "1", "2"],
        ["b", "-", "-", "-", "-", "no", "significant", "difference", "0", "0"],
    ]
    three = verdicts(first, others[:3])
    assert "IoU a" in three and "mIoU without" in three and "mean Dice" in three


def test_sides_are_ranked_by_the_score_of_objects(tmp_path):
    """The first side has the higher mIoU, the other one the higher AP."""
    units = len({*record().units})
    low, high = (UnitScore(value, [value] * units, [True] * units) for value in (0.3, 0.5))
    counts = np.maximum(record().counts - np.array([[1], [0], [0]]), 0)
    of_images = [[None, *np.linspace(0.1, 0.5, IMAGES - 1)], [0.2] * IMAGES]
    given = [
        record(counts=each, scores={"AP": score}, image_scores={"AP": values})
        for each, score, values in zip((record().counts, counts), (low, high), of_images, strict=True)
    ]
    first, other = sides([tmp_path / "a", tmp_path / "b"], given)
    # images are compared by the same score
    assert [mean_image_scores(side) for side in (first, other)] == of_images
    assert against([first, other], pytest.fail)[0].image_scores == of_images[1]
    assert scores_of(first.records)["miou"] > scores_of(other.records)["miou"]
    lines = verdicts(first, against([first, other], pytest.fail)).split("\n\n")[0].splitlines()
    assert "AP %" in lines[0] and [line.split()[:2] for line in lines[-2:]] == [["b", "50.00"], ["a", "30.00"]]
    table, *_ = result_tables([first, other])
    assert [row[0] for row in table.rows] == ["b", "a"]
    assert [(row["run"], row["AP"]) for row in run_rows([first, other])] == [("b", 0.5), ("a", 0.3)]


def test_tables_fit_a_terminal_of_120_columns(tmp_path):
    name = "backbone=dinov2_vitl14_reg4 adapter.rank=16 head=multiscale"
    first = sides([tmp_path / name], [record(classes=["a rather long name of a class", "b", "c"])])[0]
    verdict = {"value": -0.1234, "ci95": [-0.2345, -0.1234], "p": 1.2e-05, "verdict": "no significant difference"}
    scores = scores_of(first.records)
    other = OtherRun(f"{name} seed=1", scores, [], dict.fromkeys(scores, verdict), [], [])
    lines = verdicts(first, [other] * 3).splitlines()
    assert 110 < max(map(len, lines)) <= 120
    # a row has one of PQ and AP
    row = dict.fromkeys(COLUMNS.keys() - {"PQ"}, 1.0) | {
        "run": name,
        "parameters": 1_000_000_000,
        "trainable": 1_000_000_000,
    }
    assert max(map(len, costs_table([row]).splitlines())) <= 120


def add_jobs(folder, *names):
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / RECORD).touch()


def test_jobs_that_were_run_again_or_have_names_of_their_own(tmp_path, caplog):
    (tmp_path / "multirun.yaml").touch()
    (tmp_path / "sweep.csv").touch()
    for name in ("lr=0.1,seed=0", "lr=0.1,seed=1", "lr=0.2,seed=0", ".hidden"):
        (tmp_path / name).mkdir()
    assert_refused(lambda: _jobs(tmp_path, ()), "is a sweep without an evaluation", " mode=eval resume=RUN")
    add_jobs(tmp_path, "lr=0.1,seed=0", "lr=0.1,seed=1")
    assert [job.name for job in _jobs(tmp_path, ())] == ["lr=0.1,seed=0", "lr=0.1,seed=1"]
    assert "left out: lr=0.2,seed=0." in caplog.text
    add_jobs(tmp_path, "10", "9", "0", "1_2")
    assert [job.name for job in _jobs(tmp_path, ())] == ["0", "9", "10"]
    assert [job.name for job in _jobs(tmp_path, {tmp_path / "9"})] == ["0", "10"]
    assert "left out: 1_2, lr=0.1,seed=0, lr=0.1,seed=1, lr=0.2,seed=0." in caplog.text


def with_config(folder, seed=0, **data):
    config = OmegaConf.create({"seed": seed, "head": {"lr": 0.1}, "data": {"batch_size": 4, **data}})
    (folder / "config").mkdir(parents=True)
    (folder / "config/config.yaml").write_text(OmegaConf.to_yaml(config))
    return folder


def group_folders(*folders):
    return group_runs(read_recipes(folders, [record()] * len(folders)))


def test_groups_that_only_train_do_not_separate_recipes(tmp_path):
    loss = {"criterion": {"_target_": "a.Loss", "factor": 1, "ignore_index": "${data.ignore_index}"}}
    stored = {"criterion": {"factor": 1}}
    folders = []
    for seed, (option, values) in enumerate((("mine", loss), ("mine", stored), ("ours", stored))):
        folders.append(with_config(tmp_path / str(seed), seed))
        path = folders[-1] / "config/config.yaml"
        more = {"loss": values, "choices": {"loss": option, "mode": str(seed)}}
        path.write_text(OmegaConf.to_yaml({**OmegaConf.load(path), **more}))
    assert group_folders(*folders) == [[0, 1], [2]]
    known = [Recipe({"head.lr": 1}, seed) for seed in (0, 1)]
    assert group_runs([None, None, *known]) == [[0], [1], [2, 3]]  # runs of unknown config are not grouped
    assert group_runs([known[0], None, known[1]]) == [[0, 2], [1]]


def test_class_file_values_do_not_separate_recipes(tmp_path):
    left = {"background": "${dinoseg.class_file:background}", "reader": {"ids": "${dinoseg.class_file:ids,shapes}"}}
    trained = with_config(tmp_path / "trained", **left)
    evaluated = with_config(tmp_path / "evaluated", 1, background=None, reader={"ids": {11: 255, 12: 0}})
    other = with_config(tmp_path / "other", 2, background=None, reader={"ids": {11: 255}, "idsof": 1})
    more = with_config(tmp_path / "more", 1, reader={"ids": {11: 255}})
    lacking = tmp_path / "lacking"
    assert group_folders(evaluated, other, trained, lacking) == [[0, 2], [1], [3]]
    assert group_folders(evaluated, more) == [[0], [1]]
    assert read_recipes([evaluated, lacking], [record()] * 2)[0].keys["data.reader.ids.11"] == 255
