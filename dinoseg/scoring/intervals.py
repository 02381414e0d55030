"""Intervals of scores: units drawn anew, with replacement, as often as is asked for; no torch.

The units are what varies independently, not the frames of one video (B. Efron, 1979).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

_DRAWN_AT_ONCE = 2**22  # numbers, 32 MiB


class Scores(Protocol):
    """What gives scores of sums over units, as every `ScoreProtocol` does."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the scores."""
        ...

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d); nan where it is undefined."""
        ...


def resampled(protocol: Scores, sums: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Return each key's scores (resamples,) of units drawn with replacement; empty for fewer than two units."""
    count = len(sums)
    if count < 2 or resamples < 1:
        return {key: np.empty(0) for key in protocol.keys}
    generator, chance = np.random.default_rng(seed), [1 / count] * count
    # in parts: 1,000 draws of 30,000 images at once would take gigabytes
    at_once = max(1, _DRAWN_AT_ONCE // max(sums.shape))
    parts = []
    for start in range(0, resamples, at_once):
        drawn = generator.multinomial(count, chance, size=min(at_once, resamples - start))  # (R, U)
        parts.append(protocol.scores(drawn.astype(np.float64) @ sums))
    return {key: np.concatenate([part[key] for part in parts]) for key in protocol.keys}


def intervals(protocol: Scores, drawn: Mapping[str, np.ndarray]) -> dict[str, list[float] | None]:
    """Return the 95 % interval of each key's drawn scores (resamples,); None where none of them is defined."""
    limits: dict[str, list[float] | None] = {}
    for key in protocol.keys:
        defined = drawn[key][np.isfinite(drawn[key])]
        limits[key] = [float(end) for end in np.percentile(defined, (2.5, 97.5))] if len(defined) else None
    return limits
