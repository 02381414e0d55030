"""Triton kernel of `fused.py`: sums over the pixels of a grid cell and their gradients, without stored scores."""

import triton
import triton.language as tl


@triton.jit
def add_up(
    scores,  # (B, h, w, K) float32
    mask,  # (B, H, W), of any integer type
    starts,  # (h + 2 + w + 2,) int32: first pixel between each pair of grid rows, then of grid columns
    reads,  # (2 H + 2 W,) float32: weights of the grid row before and after each row, then the same for columns
    of_classes,  # (2, K) float32: entropy: weights, twice; overlap: slopes by hits and by predicted area
    sums,  # out (cells, 3, K): entropy: costs, weights, and 0; overlap: hits, predicted area, labelled area
    slopes,  # out (cells, 4, K): gradients of the cell's corners
    shape,  # K, h, w, H, W, the ignore index
    smoothing,
    CLASSES: tl.constexpr,  # K, rounded up to a power of two
    PIXELS: tl.constexpr,  # pixels per iteration
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Sum cost or overlap of the pixels between four corners of the grid, or beyond its edge; one program per cell.

    A label that is neither a class nor ignored makes the sums NaN.
    """
    num_classes, rows, columns, height, width, ignored = shape
    cell, k = tl.program_id(0).to(tl.int64), tl.arange(0, CLASSES)
    row, column, image = cell // (columns + 1) % (rows + 1), cell % (columns + 1), cell // ((rows + 1) * (columns + 1))
    known, ids = k < num_classes, mask + image * height * width
    grid = scores + image * rows * columns * num_classes + k
    # all pixels of a cell read the same four corners, which stay in registers: no score of a pixel is written to memory
    north_west, north_east, south_west, south_east = _corners(grid, row, column, rows, columns, num_classes, known)
    first = tl.load(of_classes + k, mask=known, other=0.0)[None, :]
    second = tl.load(of_classes + num_classes + k, mask=known, other=0.0)[None, :]
    top, left = tl.load(starts + row), tl.load(starts + rows + 2 + column)
    across = tl.load(starts + rows + 3 + column) - left
    count = (tl.load(starts + row + 1) - top) * across
    nothing = tl.zeros((CLASSES,), tl.float32)
    sum_0, sum_1, sum_2 = nothing, nothing, nothing
    by_north_west, by_north_east, by_south_west, by_south_east = nothing, nothing, nothing, nothing
    for start in range(0, count, PIXELS):
        index = start + tl.arange(0, PIXELS)
        inside, y, x = index < count, top + index // across, left + index % across
        north, south = _read(reads, y, height, inside)  # (pixels, 1)
        west, east = _read(reads + 2 * height, x, width, inside)
        # bilinear interpolation between the corners, as in `geometry.upsample`
        logits = north * (west * north_west + east * north_east) + south * (west * south_west + east * south_east)
        label = tl.load(ids + y * width + x, mask=inside, other=ignored).to(tl.int32)[:, None]
        labelled = label != ignored
        is_label = (k[None, :] == label) & labelled  # (pixels, classes)
        shares, log_shares = _softmax(logits, known[None, :], labelled & ((label < 0) | (label >= num_classes)))
        if ENTROPY:
            even = tl.where(labelled, smoothing / num_classes, 0.0)
            added_0, added_1, added_2, slope = _entropy(shares, log_shares, is_label, first, 1 - smoothing, even)
        else:
            added_0, added_1, added_2, slope = _overlap(shares, is_label, labelled, first, second)
        sum_0, sum_1, sum_2 = sum_0 + tl.sum(added_0, 0), sum_1 + tl.sum(added_1, 0), sum_2 + tl.sum(added_2, 0)
        if GRADIENT:
            # each program owns the slopes of its cell, so nothing is added by atomics: equal bits in each run
            by_north_west += tl.sum(north * west * slope, 0)
            by_north_east += tl.sum(north * east * slope, 0)
            by_south_west += tl.sum(south * west * slope, 0)
            by_south_east += tl.sum(south * east * slope, 0)
    _store(sums + 3 * num_classes * cell + k, num_classes, known, (sum_0, sum_1, sum_2))
    if GRADIENT:
        corners = (by_north_west, by_north_east, by_south_west, by_south_east)
        _store(slopes + 4 * num_classes * cell + k, num_classes, known, corners)


@triton.jit
def _corners(grid, row, column, rows, columns, num_classes, known):
    """Return the scores (1, K) of the four corners of a cell; corners outside the grid repeat the edge."""
    above, below = tl.maximum(row - 1, 0) * columns, tl.minimum(row, rows - 1) * columns
    before, after = tl.maximum(column - 1, 0), tl.minimum(column, columns - 1)
    north_west = tl.load(grid + (above + before) * num_classes, mask=known, other=0.0)[None, :]
    north_east = tl.load(grid + (above + after) * num_classes, mask=known, other=0.0)[None, :]
    south_west = tl.load(grid + (below + before) * num_classes, mask=known, other=0.0)[None, :]
    south_east = tl.load(grid + (below + after) * num_classes, mask=known, other=0.0)[None, :]
    return north_west, north_east, south_west, south_east


@triton.jit
def _read(reads, places, length, inside):
    """Return the weights of the grid points before and after the pixels of an axis, (pixels, 1) each."""
    before = tl.load(reads + places, mask=inside, other=0.0)
    return before[:, None], tl.load(reads + length + places, mask=inside, other=0.0)[:, None]


@triton.jit
def _softmax(logits, known, wrong):
    """Return softmax and log-softmax: 0 for padded classes, NaN where a label is invalid."""
    logits = tl.where(known, logits, float("-inf"))
    logits -= tl.max(logits, 1)[:, None]
    shares = tl.exp(logits)
    # a label that is no class cannot raise here: NaN sums stop the training with the names of the samples
    norm = tl.where(wrong, float("nan"), tl.sum(shares, 1)[:, None])
    return shares / norm, tl.where(known, logits - tl.log(norm), 0.0)


@triton.jit
def _entropy(shares, log_shares, is_label, weights, certain, even):
    """Return costs, weights, zeros, and slopes by the logits.

    The target is `certain` w on the label plus `even` w on each class.
    """
    weighted = tl.where(is_label, weights, 0.0)
    # loss -sum_k q_k log p_k; its gradient is p sum_k q_k - q
    wanted = certain * weighted + even * weights
    return -wanted * log_shares, weighted, tl.zeros_like(shares), shares * tl.sum(wanted, 1)[:, None] - wanted


@triton.jit
def _overlap(shares, is_label, labelled, by_hits, by_claims):
    """Return hits, predicted area, labelled area, and slopes by the logits."""
    shares = tl.where(labelled, shares, 0.0)
    hits = tl.where(is_label, shares, 0.0)
    # softmax: the gradient of sum_k g_k p_k by the logits is p_k (g_k - sum_j g_j p_j)
    gain = hits * by_hits + shares * by_claims
    return hits, shares, is_label.to(tl.float32), gain - shares * tl.sum(gain, 1)[:, None]


@triton.jit
def _store(places, step, known, rows):
    for number in tl.static_range(len(rows)):
        tl.store(places + number * step, rows[number], mask=known)
