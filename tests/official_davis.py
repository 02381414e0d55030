"""DAVIS's evaluation restated on stacks of single masks, pair by pair with cv2's dilation, as the official tools do."""

import warnings

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment


def disk(radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def official_region(reference, prediction, void):
    both = np.sum(reference & prediction & ~void)
    either = np.sum((reference | prediction) & ~void)
    return 1.0 if either == 0 else both / either


def official_edge(mask):
    east, south, corner = mask.copy(), mask.copy(), mask.copy()
    east[:, :-1] = mask[:, 1:]
    south[:-1] = mask[1:]
    corner[:-1, :-1] = mask[1:, 1:]
    edge = (mask ^ east) | (mask ^ south) | (mask ^ corner)
    edge[-1] = mask[-1] ^ east[-1]
    edge[:, -1] = mask[:, -1] ^ south[:, -1]
    edge[-1, -1] = False
    return edge


def official_boundary(reference, prediction, void):
    radius = int(np.ceil(0.008 * np.linalg.norm(reference.shape)))
    ours, theirs = official_edge(prediction & ~void), official_edge(reference & ~void)
    element = disk(radius)
    near_ours, near_theirs = (cv2.dilate(edge.astype(np.uint8), element) for edge in (ours, theirs))
    num_ours = ours.sum()
    num_theirs = theirs.sum()
    if num_ours == 0 and num_theirs == 0:
        precision, recall = 1, 1
    elif num_ours == 0:
        precision, recall = 1, 0
    elif num_theirs == 0:
        precision, recall = 0, 1
    else:
        precision = np.sum(ours * near_theirs) / float(num_ours)
        recall = np.sum(theirs * near_ours) / float(num_theirs)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def official_pairs(reference, prediction, num_objects, num_proposals, void=None):
    """Return J and F (P, G) of id maps, each pair by itself."""
    void = np.zeros(reference.shape, bool) if void is None else void
    found = np.zeros((2, num_proposals, num_objects))
    for proposal in range(num_proposals):
        for index in range(num_objects):
            masks = reference == index + 1, prediction == proposal + 1
            found[:, proposal, index] = official_region(*masks, void), official_boundary(*masks, void)
    return found


def official_statistics(values, limit_type=np.int64):
    """Return mean, recall and decay; the official limits are np.uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ids = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(limit_type)
        with np.errstate(over="ignore"):
            quarters = [values[ids[i] : ids[i + 1] + 1] for i in range(4)]
        decay = np.nanmean(quarters[0]) - np.nanmean(quarters[3])
        return np.nanmean(values), np.nanmean(values > 0.5), decay


def official_sequence(task, references, predictions):
    """Return the statistics (G, 6) of one sequence from its id maps, the predictions' None where not needed."""
    references = np.stack(references)
    void = references == 255
    references = np.where(void, 0, references)
    count = int(references[0].max())
    if task == "davis2017":
        references = references[1:-1]
        predictions = predictions[1:-1]
        void = np.zeros_like(void[1:-1])
    predictions = np.stack(predictions)
    proposals = max(int(predictions.max()), count) if task == "davis2017_unsupervised" else count
    frames = [
        official_pairs(*maps, count, proposals, empty)
        for *maps, empty in zip(references, predictions, void, strict=True)
    ]
    series = np.stack(frames, axis=-1)  # (2, P, G, T)
    if task == "davis2017_unsupervised":
        rows, columns = linear_sum_assignment(-(series[0].mean(axis=2) + series[1].mean(axis=2)) / 2)
        series = series[:, rows, columns]
    else:
        series = series[:, range(count), range(count)]
    return [
        [*official_statistics(region), *official_statistics(boundary)] for region, boundary in zip(*series, strict=True)
    ]
