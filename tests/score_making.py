"""What the tests of official scores share: their trees of masks, and plain references."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from making import save
from PIL import Image
from scipy import ndimage, spatial

from dinoseg.extensions.protocols.contract import BadFile, ScoringCase

PALETTE = [value for index in range(256) for value in (index, 255 - index, 7)]


def maps(rng, ids, shape=(37, 53)):
    """Return pairs of id maps that have been trouble: noise, blocks, empty, full, single pixels, rows of one id."""
    ids = np.asarray(ids)
    noise = rng.choice(ids, (2, *shape))
    coarse = rng.choice(ids, (2, -(-shape[0] // 7), -(-shape[1] // 7)))
    blocks = np.stack([np.kron(each, np.ones((7, 7), int))[: shape[0], : shape[1]] for each in coarse])
    first, last = np.full(shape, ids[0]), np.full(shape, ids[-1])
    point = first.copy()
    point[0, -1] = ids[1]
    rows = blocks[0].copy()
    rows[3] = ids[-1]
    return [
        (noise[0], noise[1]),
        (blocks[0], blocks[1]),
        (blocks[0], np.where(noise[0] == noise[1], noise[0], blocks[0])),
        (blocks[1], rows),
        (first, first),
        (first, last),
        (last, blocks[1]),
        (point, first),
        (first, point),
        (blocks[1][:, :1], blocks[0][:, :1]),
    ]


def tree(root, pairs, target):
    """Write pairs of maps as two trees; `target` gives the path of pair number i on both sides."""
    for number, pair in enumerate(pairs):
        for side, ids in zip(("reference", "prediction"), pair, strict=True):
            save(root / side / target(number), ids)
    return root / "reference", root / "prediction"


def write_frames(folder, frames, palette=True):
    """Write id maps as FOLDER/00000.png and so on, bytes with a palette; no file where a map is None."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, ids in enumerate(frames):
        if ids is not None:
            image = Image.fromarray(np.asarray(ids))
            if palette and image.mode == "L":
                image.putpalette(PALETTE)
            image.save(folder / f"{index:05d}.png")


def measure_pair(protocol, reference, prediction):
    """Measure two files as a case of their own."""
    return protocol.measure(ScoringCase("d/a", "d", ((reference, prediction),)))


def assert_bad_file(measure, path, *words):
    """Check that a call refuses a file, and that its message holds the words."""
    with pytest.raises(BadFile) as error:
        measure()
    assert error.value.path == path and not [word for word in words if word not in str(error.value)], error.value


def unit_sums(protocol, reference, prediction):
    """Find, measure and join; return the sums of each unit, which must be all that was found."""
    found = protocol.find(reference, prediction)
    assert not found.problems and found.cases
    by_unit = {}
    for case in found.cases:
        # a prediction may be missing
        assert all(isinstance(path, Path | None) for pair in case.files for path in pair)
        by_unit.setdefault(case.unit, []).append(protocol.measure(case))
    return {unit: protocol.join(measured) for unit, measured in by_unit.items()}


def total_scores(protocol, sums):
    """Return the scores of the sums (U, d) of units as plain numbers, checked to be the same over leading axes."""
    total = np.sum(sums, axis=0)
    values = protocol.scores(total)
    assert tuple(values) == tuple(protocol.keys)
    each = np.stack([*sums, total]).astype(np.float64)
    stacked = protocol.scores(np.stack([each, each]))
    for key in protocol.keys:
        singly = [protocol.scores(one)[key] for one in each]
        np.testing.assert_allclose(stacked[key], [singly, singly], rtol=1e-12)
    return {key: float(value) for key, value in values.items()}


def scores(protocol, reference, prediction):
    """Return the scores of two trees."""
    return total_scores(protocol, list(unit_sums(protocol, reference, prediction).values()))


def video_scores(protocol, reference, prediction):
    """Return the scores of two folders of videos, and what a copy of the protocol measures of each: (row, sums)."""
    found = protocol.find(reference, prediction)
    assert not found.problems
    measured = {case.name: pickle.loads(pickle.dumps(protocol)).measure(case) for case in found.cases}
    sums = np.stack([protocol.join([one]) for one in measured.values()])
    return total_scores(protocol, sums), measured, sums


def mean(values):
    """Return the mean of the values that are not None; None if there are none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def band_sizes(reference, prediction, ratio=0.02):
    """Return intersection and union of the masks less d erosions by a 3 x 3 square, outside of the image empty."""
    depth = max(1, round(ratio * float(np.hypot(*reference.shape))))
    bands = [mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), depth) for mask in (reference, prediction)]
    return (bands[0] & bands[1]).sum(), (bands[0] | bands[1]).sum()


def overlap(pairs):
    """Return IoU and Dice of the masks of a class, (reference, prediction) of each image; None where it is nowhere."""
    both, either = sum((a & b).sum() for a, b in pairs), sum((a | b).sum() for a, b in pairs)
    return (both / either, 2 * both / (both + either)) if either else (None, None)


def boundary_iou(pairs):
    """Return the Boundary IoU of the masks of a class; None where it is nowhere."""
    both, either = np.sum([band_sizes(*pair) for pair in pairs], axis=0)
    return both / either if either else None


def surface_dice(reference, prediction, tolerance=2):
    """Return the share of outline pixels near the other outline by all distances; None without any outline."""
    ours, theirs = (np.argwhere(mask & ~ndimage.binary_erosion(mask)) for mask in (reference, prediction))
    if not len(ours) or not len(theirs):
        return 0.0 if len(ours) or len(theirs) else None
    squares = spatial.distance.cdist(ours, theirs, "sqeuclidean")
    near = (squares.min(axis=0) <= tolerance**2).sum() + (squares.min(axis=1) <= tolerance**2).sum()
    return near / (len(ours) + len(theirs))
