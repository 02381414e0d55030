"""What the seeds of one setting say together: their mean, how far they scatter, and the interval of the mean."""

from collections.abc import Sequence
from statistics import stdev
from typing import Any

from dinoseg.cli.sweeps.folds import DEVIATION, Row, grouped
from dinoseg.evaluation.scoring.intervals import mean_of
from dinoseg.utils.wording import count_of

SEED = "seed"
LOW, HIGH = "low", "high"  # ends of the 95 % interval


def over_seeds(rows: Sequence[Row], settings: Sequence[str], scores: Sequence[str], others: Sequence[str]) -> list[Row]:
    """Return a row for each setting, with the number of its seeds that have scored under `seeds`.

    Of a score it has the mean and, under the score's name and a word, the deviation of a sample and the ends of the 95
    % interval of the mean (Student's t over seeds), None for one seed.

    Args:
        rows: of all jobs.
        settings: the keys swept beside the seed.
        scores: keys to summarise.
        others: keys of what seeds do not change, or hardly: of counts the first is taken, else the mean.
    """
    return [_summed_up(group, settings, scores, others) for group in grouped(rows, settings)]


def _summed_up(seeds: Sequence[Row], settings: Sequence[str], scores: Sequence[str], others: Sequence[str]) -> Row:
    notes = [str(row["note"]) for row in seeds if row["note"]]
    whole = len(seeds) - len(notes)
    found: Row = {"job": ",".join(str(row["job"]) for row in seeds), "seeds": whole}
    found["note"] = f"{whole} of {count_of(seeds, 'seed')}: {notes[0]}" if notes else ""
    for key in scores:
        values = _defined(seeds, key)
        mean = mean_of(values)
        low, high = mean.ci95 or (None, None)
        found[key] = mean.value if values else None
        found |= {f"{key} {DEVIATION}": stdev(values) if len(values) > 1 else None}
        found |= {f"{key} {LOW}": low, f"{key} {HIGH}": high}
    for key in others:
        values = _defined(seeds, key)
        found[key] = None if not values else values[0] if isinstance(values[0], int) else mean_of(values).value
    return found | {key: seeds[0][key] for key in settings}


def _defined(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row.get(key) is not None]
