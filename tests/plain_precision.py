"""Average precision of pixels and of objects, and the best threshold of a class, by plain loops."""

import numpy as np

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


def plain_ap(reference, results, category, sizes, threshold, *, by_share=True):
    """Return the AP of one class, range of areas and IoU, in loops over decoded masks; None without objects.

    A result has the size of its `area`, or of its mask. With a crowd it has the share that lies there, or the IoU.
    """
    found = []
    positives = 0
    for image in sorted(entry["id"] for entry in reference["images"]):
        held, predicted = (
            [each for each in entries if (each["image_id"], each["category_id"]) == (image, category)]
            for entries in (reference["annotations"], results)
        )
        outside = [each["iscrowd"] or not sizes[0] <= each["area"] <= sizes[1] for each in held]
        positives += outside.count(False)
        used = set()
        for result in sorted(predicted, key=lambda each: -each["score"])[:100]:
            match = None
            for ignored in (False, True):
                best = min(threshold, 1 - 1e-10)
                for place, each in enumerate(held):
                    if match is not None and outside[match] != ignored:
                        break
                    if outside[place] != ignored or (place in used and not each["iscrowd"]):
                        continue
                    common = float((result["mask"] & each["mask"]).sum())
                    whole = result["mask"] if each["iscrowd"] and by_share else result["mask"] | each["mask"]
                    iou = common / float(whole.sum()) if common else 0.0
                    if iou >= best:
                        best, match = iou, place
            if match is not None:
                used.add(match)
                if not outside[match]:
                    found.append((result["score"], True))
            elif sizes[0] <= result.get("area", result["mask"].sum()) <= sizes[1]:
                found.append((result["score"], False))
    if not positives:
        return None
    points = []
    hits = 0
    for count, (_, hit) in enumerate(sorted(found, key=lambda each: -each[0]), 1):
        hits += hit
        points.append((hits / positives, hits / count))
    return float(np.mean([max((p for r, p in points if r >= level), default=0) for level in np.linspace(0, 1, 101)]))
