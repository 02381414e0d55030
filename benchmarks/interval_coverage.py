"""Print how often 95 % intervals hold the truth: percentile bootstrap, BCa and Student's t, over few units and many.

`python benchmarks/interval_coverage.py [RUN [RUN]] [--images] [--simulations 1000]`: a population of units is what
RUN, a folder of mode=eval, has counted in its videos or drives (`--images`: in its images), or one that is drawn, of
heavy tails. Units of it, drawn with replacement, are a data set; the score of the whole population is the truth.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri
from tabulate import tabulate

from dinoseg.evaluation.image_record import find_evaluation, read_record
from dinoseg.evaluation.scoring.intervals import (
    ScoreFunction,
    estimate_difference,
    jackknife,
    leave_one_out,
    mean_of,
    score_units,
    unit_sums,
)
from dinoseg.evaluation.unit_scores import ClassScores

UNITS = (5, 10, 13, 30, 100)
DRAWS = 1000  # of a bootstrap
PRESENT = (1.0, 1.0, 0.9, 0.7, 0.5, 0.3)  # share of the drawn units that hold a class
RECALL = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
SEED_SPREAD, UNIT_SPREAD = 0.15, 0.6  # of the logit of a recall, by seed and by unit
METHODS = ("percentile", "BCa", "t", "ours: t, of shares by their logits")


class Population(NamedTuple):
    """Units of two runs.

    Args:
        name: in words.
        kind: the scores.
        sums: (U, 6 K) of both runs, side by side.
    """

    name: str
    kind: ClassScores
    sums: np.ndarray


@dataclass(frozen=True)
class Difference:
    """Scores of a second run minus those of a first one, from sums (..., 2 d) of both side by side."""

    kind: ClassScores
    highest: ClassVar[Mapping[str, float]] = {}

    @property
    def keys(self) -> Sequence[str]:
        """Return the names of the scores."""
        return self.kind.keys

    @property
    def unbounded(self) -> Sequence[str]:
        """Return all names: a difference may be negative."""
        return self.kind.keys

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's difference (...)."""
        first, second = (self.kind.scores(part) for part in np.split(sums, 2, axis=-1))
        return {key: second[key] - first[key] for key in self.kind.keys}


def drawn_population(generator: np.random.Generator, count: int = 1000) -> Population:
    """Draw units whose sizes, classes and difficulty have heavy tails, for two runs of which one is better."""
    reference = drawn_reference(generator, count)
    runs = [drawn_run(generator, reference, shift) for shift in (0.0, 0.3)]
    return Population("drawn", ClassScores(len(PRESENT)), np.concatenate(runs, axis=1))


def drawn_reference(generator: np.random.Generator, count: int) -> np.ndarray:
    """Return the pixels (count, K) of each class: log-normal, in units of log-normal sizes."""
    sizes = generator.lognormal(0, 0.8, (count, 1)) * np.geomspace(4e5, 2e3, len(PRESENT))
    held = generator.random((count, len(PRESENT))) < PRESENT
    return np.rint(held * sizes * generator.lognormal(0, 1, (count, len(PRESENT))))


def drawn_run(generator: np.random.Generator, reference: np.ndarray, shift: float) -> np.ndarray:
    """Return a run's sums (U, 3 K): recalls vary by seed and by unit, and what is missed is taken for other classes."""
    logits = np.log(RECALL) - np.log1p(-np.array(RECALL)) + shift + SEED_SPREAD * generator.normal(size=len(RECALL))
    logits = logits + UNIT_SPREAD * generator.normal(size=reference.shape)
    right = np.rint(reference / (1 + np.exp(-logits)))
    missed = (reference - right).sum(axis=1, keepdims=True)
    predicted = right + np.rint(missed * generator.dirichlet(5 * np.array(PRESENT), len(reference)))
    return np.concatenate([right, reference, predicted], axis=1)


def counted_population(folders: list[Path], images: bool) -> Population:
    """Return the units of one or two evaluations; of one, the second run is the first with half of its errors."""
    records = [read_record(find_evaluation(folder)) for folder in folders]
    counts = [record.counts for record in records]
    if len(counts) == 1:
        right, reference, predicted = np.moveaxis(counts[0], 1, 0)
        counts.append(np.stack([(right + reference) // 2, reference, (reference + predicted) // 2], axis=1))
    units = list(records[0].images) if images else list(records[0].units)
    sums = np.concatenate([unit_sums(each, units) for each in counts], axis=1).astype(np.float64)
    unit = "image" if images else records[0].unit
    return Population(f"{records[0].data}, {len(sums)} {unit}s", ClassScores(len(records[0].classes)), sums)


def percentile_limits(drawn: np.ndarray) -> np.ndarray | None:
    """Return the ends of Efron's percentile interval (1979)."""
    return np.percentile(drawn, (2.5, 97.5)) if len(drawn) else None


def bca_limits(drawn: np.ndarray, value: float, left_out: np.ndarray) -> np.ndarray | None:
    """Return the ends of Efron's BCa interval (1987), from scores drawn and scores without each unit."""
    below = ((drawn < value).sum() + (drawn <= value).sum()) / (2 * max(len(drawn), 1))
    gaps = left_out.mean() - left_out
    if not 0 < below < 1 or not np.isfinite(gaps).all() or not gaps.any():
        return None
    acceleration = (gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5)
    bias = ndtri(below)
    shifted = bias + ndtri(np.array([0.025, 0.975]))
    return np.percentile(drawn, 100 * ndtr(bias + shifted / (1 - acceleration * shifted)))


def limits_of(
    kind: ScoreFunction, sums: np.ndarray, generator: np.random.Generator
) -> Iterator[tuple[str, str, np.ndarray | list[float] | None]]:
    """Yield method, key and interval of each."""
    times = generator.multinomial(len(sums), [1 / len(sums)] * len(sums), size=DRAWS)
    drawn, left_out, estimates = kind.scores(times @ sums), leave_one_out(kind, sums), jackknife(kind, sums)
    for key, estimate in estimates.items():
        defined = drawn[key][np.isfinite(drawn[key])]
        yield METHODS[0], key, percentile_limits(defined)
        yield METHODS[1], key, bca_limits(defined, estimate.value, left_out[key])
        yield METHODS[2], key, replace(estimate, share=False).ci95
        yield METHODS[3], key, estimate.ci95


def coverage(population: Population, simulations: int, generator: np.random.Generator) -> list[list[str]]:
    """Return rows of what is estimated, the method, and for each number of units how often the truth is held."""
    first = population.sums.shape[1] // 2
    rare = f"iou/{int(population.sums[:, first // 3 : 2 * first // 3].sum(axis=0).argmin())}"
    scores = {"mIoU": (population.kind, "miou", first), "IoU of the rarest class": (population.kind, rare, first)}
    scores["difference of mIoU"] = (Difference(population.kind), "miou", 2 * first)
    found: dict[tuple[str, str, int], list[bool | None]] = defaultdict(list)
    widths: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for units in UNITS:
        for _ in range(simulations):
            sample = population.sums[generator.integers(0, len(population.sums), units)]
            for name, (kind, wanted, columns) in scores.items():
                truth = float(kind.scores(population.sums[:, :columns].sum(axis=0))[wanted])
                for method, key, limits in limits_of(kind, sample[:, :columns], generator):
                    if key != wanted:
                        continue
                    found[name, method, units].append(None if limits is None else limits[0] <= truth <= limits[1])
                    if limits is not None:
                        widths[name, method, units].append(float(limits[1] - limits[0]))
    rows = []
    for name in scores:
        for method in METHODS:
            cells = [told(found[name, method, units], widths[name, method, units]) for units in UNITS]
            rows.append([name, method, *cells])
    return rows


def told(held: list[bool | None], widths: list[float]) -> str:
    """Return how often intervals held the truth, their mean width, and how often there was none."""
    given = [each for each in held if each is not None]
    if not given:
        return "none"
    none = 1 - len(given) / len(held)
    return f"{np.mean(given):.1%} ({100 * np.mean(widths):.0f})" + (f", none {none:.0%}" if none else "")


def coverage_of_seeds(simulations: int, generator: np.random.Generator, seeds: int = 3) -> list[list[str]]:
    """Return how often the difference of two sides of one recipe holds 0, with seeds as further units and without."""
    kind = ClassScores(len(PRESENT))
    cells: dict[str, list[str]] = {"seeds left out": [], f"{seeds} seeds a side as further units": []}
    for units in UNITS:
        held: list[list[bool]] = [[], []]
        for _ in range(simulations):
            reference = drawn_reference(generator, units)
            runs = [drawn_run(generator, reference, 0.0) for _ in range(2 * seeds)]
            mious = [score_units(kind, run)["miou"] for run in runs]
            sides = mious[:seeds], mious[seeds:]
            by_seed = [[mean_of([float(score.value or 0) for score in side])] for side in sides]
            for place, each in enumerate((estimate_difference(*sides), estimate_difference(*sides, by_seed))):
                low, high = each.ci95 or (0.0, 0.0)
                held[place].append(low <= 0 <= high)
        for row, each in zip(cells.values(), held, strict=True):
            row.append(f"{np.mean(each):.1%}")
    return [["difference of two equal recipes", name, *row] for name, row in cells.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if len(asked.runs) > 2:
        sys.exit(f"{len(asked.runs)} runs: give two at most.")
    generator = np.random.default_rng(asked.seed)
    population = counted_population(asked.runs, asked.images) if asked.runs else drawn_population(generator)
    rows = coverage(population, asked.simulations, generator)
    if not asked.runs:
        rows += coverage_of_seeds(asked.simulations, generator)
    heads = [f"{population.name}: 95 % interval of", "by", *(f"{units} units" for units in UNITS)]
    print(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))
    print(f"\nHow often the truth was held in {asked.simulations} data sets (mean width, points); seed {asked.seed}")


if __name__ == "__main__":
    main()
