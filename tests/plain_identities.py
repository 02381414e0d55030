"""The rules of identities of objects in float64: cells one by one, and every pairing of objects and tracks."""

import numpy as np
import torch

from dinoseg.extensions.tracking.identities import separate_objects


class PlainTracks:
    """IDs of objects in the frames of a video whose size is a multiple of the cells of 4 px.

    Features are those of the backbone, as unit vectors. A track is known by its ID.
    """

    def __init__(self, backbone, settings, keep, min_score=0.5, things=(0, 1)):
        self.backbone, self.settings, self.keep, self.min_score, self.things = (
            backbone,
            settings,
            keep,
            min_score,
            things,
        )
        self.memory = []  # features (h, w, C) and shares (h, w) by ID of the last frames
        self.classes, self.missed = {}, {}  # by ID, of the tracks that have not ended
        self.next = 1

    def track(self, frame, objects):
        """Return the mask (H, W) of the next frame."""
        counts = [score >= self.min_score and kind in self.things
                  for score, kind in zip(objects.scores, objects.classes, strict=True)]  # fmt: skip
        objects, numbers = separate_objects(objects.select(np.flatnonzero(counts)))
        cells = self.features(frame)
        areas = [
            (numbers == number).reshape(len(cells), 4, -1, 4).mean(axis=(1, 3)) for number in range(1, len(objects) + 1)
        ]
        past = {one: self.spread(cells, self.memory, one) for one in self.classes}
        iou = {}
        for one, kind in self.classes.items():
            for place, area in enumerate(areas):
                if kind == objects.classes[place]:
                    iou[one, place] = max(overlap(past[one], area), overlap(self.memory[-1][1][one], area))
        best = max(
            pairings([pair for pair, value in iou.items() if value >= 0.5]), key=lambda some: sum(map(iou.get, some))
        )
        found = {place: one for one, place in best}
        shares = {}
        for one in self.classes:
            shares[one] = past[one]
            self.missed[one] += 1
        for one in found.values():
            self.missed[one] = 0
        for one in [one for one, missed in self.missed.items() if missed > self.keep]:
            del self.missed[one], self.classes[one], shares[one]
            for _, labels in self.memory:
                del labels[one]
        for place in [place for place in range(len(areas)) if place not in found]:
            one = found[place] = self.next
            self.next += 1
            self.classes[one], self.missed[one] = objects.classes[place], 0
            for features, labels in self.memory:
                labels[one] = self.spread(features, [(cells, {one: areas[place]})], one)
        shares |= {one: areas[place] for place, one in found.items()}
        self.memory.append((cells, shares))
        if len(self.memory) > self.settings.context:
            lost = [one for one, missed in self.missed.items() if missed]
            needed = [int(np.argmax([labels[one].sum() for _, labels in self.memory])) for one in lost]
            self.memory.pop(min({*range(self.settings.context)} - {*needed}, default=0))
        return np.array([0, *(found[place] for place in range(len(areas)))], np.uint8)[numbers]

    def features(self, frame):
        """Return the features (h, w, C) of a frame as unit vectors."""
        image = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            cells = self.backbone(image)[-1][0].permute(1, 2, 0).double().numpy()
        return cells / np.linalg.norm(cells, axis=2, keepdims=True)

    def spread(self, target, memory, one):
        """Return the shares (h, w) of an ID in a frame with features (h, w, C), by the most similar cells."""
        result = np.zeros(target.shape[:2])
        places = np.indices(result.shape)
        for row, column in np.ndindex(result.shape):
            near = (places[0] - row) ** 2 + (places[1] - column) ** 2 <= self.settings.radius**2
            alike = np.concatenate([features[near] @ target[row, column] for features, _ in memory])
            values = np.concatenate([labels[one][near] for _, labels in memory])
            used = alike >= np.sort(alike)[-min(self.settings.top_k, len(alike))] - 1e-9
            weights = np.exp((alike[used] - alike.max()) / self.settings.temperature)
            result[row, column] = (weights * values[used]).sum() / weights.sum()
        return result


def overlap(first, second):
    """Return the IoU of two soft masks, 0 if both are empty."""
    union = np.maximum(first, second).sum()
    return np.minimum(first, second).sum() / union if union else 0.0


def pairings(pairs):
    """Yield every set of pairs of which no two share a track or an object."""
    if not pairs:
        yield []
        return
    first, *rest = pairs
    yield from pairings(rest)
    for some in pairings([pair for pair in rest if pair[0] != first[0] and pair[1] != first[1]]):
        yield [first, *some]
