"""Common pixels of the masks of objects, without decoding these."""

from collections.abc import Sequence

import numpy as np

from dinoseg.core.objects import RunLengths


def overlaps(first: Sequence[RunLengths], second: Sequence[RunLengths]) -> np.ndarray:
    """Return the common pixels (D, G) int64 of each of D masks with each of G masks of the same image."""
    owners = np.repeat(np.arange(len(first)), [len(runs.starts) for runs in first])
    starts = np.concatenate([np.empty(0, np.int64), *(runs.starts for runs in first)])
    ends = np.concatenate([np.empty(0, np.int64), *(runs.ends for runs in first)])
    found = np.zeros((len(first), len(second)), np.int64)
    for column, runs in enumerate(second):
        # ones of a mask in [start, end) = ones before end - ones before start: O(R log R), whatever the image's size
        np.add.at(found[:, column], owners, runs.count_within(starts, ends))
    return found
