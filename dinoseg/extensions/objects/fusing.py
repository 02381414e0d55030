"""Instances of an image from those of several models: objects that overlap vote on the pixels of one."""

from collections.abc import Sequence

import numpy as np

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.objects.overlaps import overlaps

MIN_IOU = 0.5  # of two objects that are one


def fuse_instances(members: Sequence[Objects], most: int) -> Objects:
    """Return the instances of an image from those of several models, best first.

    This is weighted boxes fusion (Solovyev et al., arXiv 1910.13302) with masks. In the order of scores, an object
    joins the group of its class whose first object has the highest IoU with it, at least `MIN_IOU`, among those without
    an object of its model; else it begins a group. A group has the pixels of objects with more than half of its scores,
    and scores the sum over the models divided by their number.

    Args:
        members: instances of each model.
        most: number of instances, those of the highest scores.
    """
    masks = [mask for each in members for mask in each.masks]
    classes, scores = (np.concatenate([getattr(each, name) for each in members]) for name in ("classes", "scores"))
    owners = np.repeat(np.arange(len(members)), [len(each) for each in members])
    groups = _group(masks, classes, scores, owners)
    fused = Objects.of_runs(
        members[0].size,
        [_vote([masks[place] for place in group], scores[group]) for group in groups],
        [classes[group[0]] for group in groups],
        [scores[group].sum() / len(members) for group in groups],
    ).sort_by_score()
    return fused.select(np.arange(min(len(fused), most)))


def _group(masks: Sequence[RunLengths], classes: np.ndarray, scores: np.ndarray, owners: np.ndarray) -> list[list[int]]:
    """Return the places of the objects of each group, the one of the highest score first."""
    common = overlaps(masks, masks)
    areas = common.diagonal()
    ious = common / np.maximum(areas[:, None] + areas - common, 1)
    ious[classes[:, None] != classes] = 0
    groups: list[list[int]] = []
    is_free = np.zeros((0, owners.max(initial=-1) + 1), bool)  # whether a group has no object of a model
    for place in np.argsort(-scores, kind="stable").tolist():
        shares = ious[place, [group[0] for group in groups]] * is_free[:, owners[place]]
        best = int(shares.argmax()) if groups else 0
        if not groups or shares[best] < MIN_IOU:
            best = len(groups)
            groups.append([])
            is_free = np.append(is_free, np.ones((1, is_free.shape[1]), bool), axis=0)
        groups[best].append(place)
        is_free[best, owners[place]] = False
    return groups


def _vote(masks: Sequence[RunLengths], weights: np.ndarray) -> RunLengths:
    """Return the runs of the pixels that masks with more than half of the weights have."""
    bounds = np.unique(np.concatenate([side for mask in masks for side in mask]))
    starts, ends = bounds[:-1], bounds[1:]
    inside = np.array([mask.count_within(starts, ends) > 0 for mask in masks])
    kept = 2 * (weights @ inside) > weights.sum()
    return RunLengths.union([RunLengths(starts[kept], ends[kept])])
