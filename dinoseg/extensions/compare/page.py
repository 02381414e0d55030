"""Report that compares evaluations of the same images: differences, their intervals, and example images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinoseg.core.sizes import evenly_spaced
from dinoseg.extensions.compare.paper_table import find_main_score
from dinoseg.report.html.charts import Axes, line_chart, range_around, scatter_chart, thin
from dinoseg.report.html.page import render
from dinoseg.report.html.pictures import EvaluatedImages, PairShot, pair_card
from dinoseg.report.table import MEANS, few_units
from dinoseg.utils.wording import count_of

_MAX_DOTS = 2000  # dots per chart: with more, a page takes seconds to open
_MAX_NAMED = 6  # images named as decisive


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison.

    Args:
        name: name of the run.
        scores: scores by name.
        image_scores: of each image by itself, the score that ranks the runs; None where undefined.
    """

    name: str
    scores: Mapping[str, float | None]
    image_scores: Sequence[float | None]


@dataclass(frozen=True)
class OtherRun(ComparedRun):
    """A run compared with the first run.

    Args:
        differences: `value`, `ci95`, `p` and `verdict` by score name: this run minus the first.
        decides: contribution of each image to the mIoU difference.
        shots: images with the greatest gain or loss.
        no_pictures: reason why there are no images; empty if there are some.
    """

    differences: Mapping[str, Mapping[str, Any]]
    decides: Sequence[float | None]
    shots: Sequence[PairShot]
    no_pictures: str = ""

    def count_classes(self, verdict: str) -> int:
        """Return the number of classes whose IoU differs with this verdict."""
        return sum(gap["verdict"] == verdict for key, gap in self.differences.items() if key.startswith("iou/"))


def comparison_page(
    evaluated: EvaluatedImages,
    first: ComparedRun,
    others: Sequence[OtherRun],
    *,
    subtitle: str,
    intervals: str,
    seeds: str,
    about: Mapping[str, Any],
) -> str:
    """Return the page as HTML.

    Args:
        evaluated: the images that all runs predict.
        first: run with which the others are compared.
        others: runs compared with the first.
        subtitle: a line below the title.
        intervals: note on the units of the intervals.
        seeds: note on other seeds.
        about: see `evaluation.run_facts.about_run`.
    """
    classes, units = evaluated.classes, evaluated.count_units()
    means = {key: MEANS.get(key, key) for key in first.scores if not key.startswith("iou/")}
    main = find_main_score(means)
    class_keys = [f"iou/{index}" for index in range(len(classes))]
    return render(
        "extensions/compare/comparison.html.jinja",
        title=f"{others[0].name if len(others) == 1 else count_of(others, 'side')} against {first.name}",
        subtitle=subtitle,
        warnings=[few_units(units, evaluated.unit)],
        means=means,
        main=main,
        class_keys=class_keys,
        classes=classes,
        palette=evaluated.palette,
        first=first.name,
        scores=first.scores,
        others=others,
        sides=[
            {
                "other": other,
                "images": compare_images(evaluated.images, first, other),
                "cards": [pair_card(shot, (first.name, other.name), evaluated, means[main]) for shot in other.shots],
            }
            for other in others
        ],
        reach={
            "scores": _largest_gap(others, [main]),
            "means": _largest_gap(others, means),
            "classes": _largest_gap(others, class_keys),
        },
        units=units,
        unit=evaluated.unit,
        intervals=intervals,
        seeds=seeds,
        images=len(evaluated.images),
        about=about,
    )


def _largest_gap(others: Sequence[OtherRun], keys: Iterable[str]) -> float:
    """Return how far the differences of scores, or their intervals, reach from 0."""
    gaps = [other.differences[key] for other in others for key in keys]
    return max([abs(end) for gap in gaps for end in (gap["ci95"] or [gap["value"] or 0.0])] + [0.01])


def compare_images(images: Sequence[str], first: ComparedRun, other: OtherRun) -> dict[str, Any] | None:
    """Return how many images another run predicts better, those that decide the difference, and charts of all.

    None: no image has a score.
    """
    pairs = [
        (100 * before, 100 * after, name)
        for before, after, name in zip(first.image_scores, other.image_scores, images, strict=True)
        if before is not None and after is not None
    ]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: pair[1] - pair[0])
    gaps = [after - before for before, after, _ in pairs]
    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    decisive = [(share, name) for share, name in zip(other.decides, images, strict=True) if share]
    decisive.sort(key=lambda pair: -abs(pair[0]))
    drawn = evenly_spaced(len(pairs), _MAX_DOTS)
    title = "Each image" if len(drawn) == len(pairs) else f"{_MAX_DOTS} of the images, evenly spaced by difference"
    ends = range_around([value for pair in pairs for value in pair[:2]])
    axes = Axes(ends, ends, f"{first.name}, %", f"{other.name}, %")
    curve = thin([(float(index), gap) for index, gap in enumerate(gaps, start=1)])
    sorted_axes = Axes((1, max(2, len(gaps))), range_around(gaps, zero=True), "images, sorted", "points")
    return {
        "better": better,
        "worse": worse,
        "equal": len(gaps) - better - worse,
        "count": len(gaps),
        "decisive": decisive[:_MAX_NAMED],
        "charts": [
            scatter_chart(title, [pairs[index] for index in drawn], axes),
            line_chart("Sorted differences", [(other.name, curve)], sorted_axes),
        ],
    }
