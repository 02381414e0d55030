"""What the tests of official scores make their trees with."""

from pathlib import Path

import numpy as np
from PIL import Image

from dinoseg.metrics.protocols.contract import ScoringCase


def save(path, ids, dtype=np.uint8):
    """Write ids as a grey PNG, its folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(ids, dtype=dtype)).save(path)
    return path


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


def unit_sums(protocol, reference, prediction):
    """Find, measure and join; return the sums of each unit, which must be all that was found."""
    found = protocol.find(reference, prediction)
    assert not found.problems and found.cases
    by_unit = {}
    for case in found.cases:
        assert isinstance(case, ScoringCase) and all(isinstance(path, Path) for pair in case.files for path in pair)
        by_unit.setdefault(case.unit, []).append(protocol.measure(case))
    return {unit: protocol.join(measured) for unit, measured in by_unit.items()}


def scores(protocol, reference, prediction):
    """Return the scores of two trees as plain numbers, checked to be the same over leading axes."""
    sums = unit_sums(protocol, reference, prediction)
    total = np.sum(list(sums.values()), axis=0)
    values = protocol.scores(total)
    assert tuple(values) == tuple(protocol.keys)
    each = np.stack([*sums.values(), total]).astype(np.float64)
    stacked = protocol.scores(np.stack([each, each]))
    for key in protocol.keys:
        singly = [protocol.scores(one)[key] for one in each]
        np.testing.assert_allclose(stacked[key], [singly, singly], rtol=1e-12)
    return {key: float(value) for key, value in values.items()}
