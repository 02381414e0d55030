"""INSID3's steps 5 to 12 as plain loops over patches and pixels, by their definitions."""

import math

import numpy as np


def unit(vector):
    return vector / math.sqrt(sum(value * value for value in vector))


def bilinear(values, size):
    """Return values (h, w) at a size, each pixel from its four neighbours."""
    height, width = values.shape
    found = np.zeros(size)
    for row, column in np.ndindex(*size):
        y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
        x = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
        for a in (math.floor(y), math.ceil(y)) if y % 1 else (int(y),):
            for b in (math.floor(x), math.ceil(x)) if x % 1 else (int(x),):
                found[row, column] += (1 - abs(y - a)) * (1 - abs(x - b)) * values[a, b]
    return found


def average_linkage(raw, cut):
    """Return clusters as lists of patches: the closest two are joined while their mean distance is below `cut`."""
    distances = [[1 - min(max(float(a @ b), -1), 1) for b in raw] for a in raw]
    clusters = [[patch] for patch in range(len(raw))]
    while len(clusters) > 1:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        means = [np.mean([distances[p][q] for p in clusters[a] for q in clusters[b]]) for a, b in pairs]
        if min(means) >= cut:
            break
        a, b = pairs[int(np.argmin(means))]
        clusters[b] += clusters.pop(a)
    return clusters


def scores_of(shots, raw, features, tau):
    """Return the score of each patch by shots (features, mask)."""
    means = [sum(f for f, inside in zip(*shot, strict=True) if inside) / sum(shot[1]) for shot in shots]
    prototype = unit(sum(means) / len(means))
    similarity = [float(prototype @ patch) for patch in features]
    bound = 0 if max(similarity) > 0 else np.quantile(similarity, 0.9)
    candidates = set()
    for patch, own in enumerate(features):
        votes = 0
        for others, mask in shots:
            nearest = max(range(len(others)), key=lambda other: float(own @ others[other]))
            votes += bool(mask[nearest])
        if similarity[patch] > bound and 2 * votes >= len(shots):
            candidates.add(patch)
    scores = np.zeros(len(features))
    clusters = average_linkage(raw, 1 - tau)
    matched = [cluster for cluster in clusters if candidates & {*cluster}]
    if not matched:
        return scores
    seed = max(matched, key=lambda cluster: float(unit(sum(features[p] for p in cluster)) @ prototype))
    for cluster in matched:
        cross = sum(similarity[p] for p in cluster) / len(cluster)
        intra = float(unit(sum(raw[p] for p in cluster)) @ unit(sum(raw[p] for p in seed)))
        coverage = 1 if cluster is seed else len(candidates & {*cluster}) / len(cluster)
        scores[cluster] = cross * intra * coverage
    return scores
