"""Average precision and the best threshold of a class, by plain loops over pixels and thresholds."""

from dinoseg.core.metric import BINS


def plain_average_precision(scores, labels):
    """Return the sum of precision times gained recall over distinct scores, highest first; None without positives."""
    found = 0.0
    hits = 0
    predicted = 0
    positive = sum(labels)
    by_level = {}
    for score, label in zip(scores, labels, strict=True):
        by_level.setdefault(score, []).append(label)
    for _, new in sorted(by_level.items(), reverse=True):
        hits, predicted = hits + sum(new), predicted + len(new)
        found += sum(new) / positive * hits / predicted if positive else 0
    return found if positive else None


def search_threshold(positives, totals, beta):
    """Return the middle one of the best thresholds of a class, by a plain search."""
    if not sum(positives):
        return 0.5
    scores = {}
    hits = 0
    predicted = 0
    for level in range(BINS - 1, 0, -1):
        hits, predicted = hits + positives[level], predicted + totals[level]
        false_negatives, false_positives = sum(positives) - hits, predicted - hits
        weighted = (1 + beta**2) * hits
        scores[level] = weighted / (weighted + beta**2 * false_negatives + false_positives)
    highest = max(scores.values())
    best = sorted(level for level, score in scores.items() if score == highest)
    return best[(len(best) - 1) // 2] / BINS
