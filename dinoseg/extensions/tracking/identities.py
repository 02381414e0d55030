"""Tracker of single objects: the objects that a model finds in each frame get an ID for the whole video."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.objects import Objects
from dinoseg.core.task import ObjectTask
from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.tracking.grid.assignment import match_objects
from dinoseg.extensions.tracking.grid.cells import area_mean, soft_iou
from dinoseg.extensions.tracking.grid.propagator import ContextFrame, check_finite, match, unit_features
from dinoseg.extensions.tracking.grid.settings import MatchSettings
from dinoseg.extensions.tracking.segmenter_tracker import SegmenterTracker, Share, crop_to_image
from dinoseg.extensions.tracking.state_form import TensorForm, check_state
from dinoseg.extensions.tracking.tracker import Autocast, TrackedObject
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError

MAX_IDS = VOID - 1
_MIN_VISIBLE = 0.5  # share of a mask below which it repeats better objects, as another query of the same object
_FORMS = {
    "features": TensorForm(torch.float32, "F h w C"),
    "labels": TensorForm(torch.float32, "F h w L"),
    "tracks": TensorForm(torch.float64, "I 4", -1),
    "size": TensorForm(torch.int64, "2", 1),
}


@dataclass
class Track:
    """State of an ID.

    Args:
        class_id: of all its objects.
        score: sum of the scores of its objects.
        found: number of frames in which the model found it.
        missed: number of frames since the last of them; -1: it has ended.
    """

    class_id: int
    score: float = 0.0
    found: int = 0
    missed: int = 0


class ObjectTracker(SegmenterTracker):
    """Tracker that segments each frame into objects, and matches them with those of earlier frames.

    The masks of the last frames are propagated to the next one. Its objects are assigned to the tracks of their class
    so that the sum of the IoU with their masks, propagated or last (the greater IoU), is greatest; pairs have at least
    0.5. The IoU is that of the shares of the feature grid's cells, so that objects smaller than a cell count, too.
    Objects without a pair get a new ID.

    Masks hold IDs 1 to 254 in the order of appearance, and 0 elsewhere. An object that is not found has no pixel, but
    its mask is still propagated, for `keep` frames. Then the ID ends, and is never used again. Pixels of several
    objects belong to the one of the highest score.

    Args:
        model: model of a task of objects in eval mode, on its device.
        settings: matching between a cell and the cells of earlier frames.
        keep: frames for which an object is followed without being found.
        min_score: score from which objects count.
        sizes: image sizes of its training, to which larger frames are reduced; None: no reduction.
        autocast: context manager factory of the precision.
        batch_size: frames per forward pass.
    """

    def __init__(
        self,
        model: SegmentationModel,
        settings: MatchSettings = MatchSettings(),  # noqa: B008 (frozen)
        *,
        keep: int = 30,
        min_score: float = 0.5,
        sizes: TrainedSizes | None = None,
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
    ) -> None:
        # frame 0 has no given mask, and is a frame as any other
        unread = ("window_first", "repeat_first")
        super().__init__(model, settings, sizes=sizes, autocast=autocast, batch_size=batch_size, unread=unread)
        assert isinstance(model.task, ObjectTask)
        self._things = [*model.task.things]
        self._keep, self._min_score = keep, min_score
        self._search = replace(settings, window_first=True)
        self._memory: list[ContextFrame] = []  # labels (h, w, M) of the tracks that have not ended, in their order
        self._tracks: list[Track] = []  # of ID 1 and so on

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that masks depend on besides frames and labels."""
        return {"kind": "identities", "keep": self._keep, "min_score": self._min_score, **self._common_settings()}

    @torch.no_grad()
    def track_batch(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the IDs (H, W) uint8 of the next frames.

        Raises:
            UserError: labels are given, or there are more than 254 objects.
        """
        prediction, maps = self._predict(frames, labels)
        found = zip(prediction.objects(), maps, strict=True)
        return [self._track_frame(objects, features, prediction.valid) for objects, features in found]

    def tracked_objects(self) -> dict[int, TrackedObject]:
        """Return the class and the mean score of each ID so far."""
        return {
            number: TrackedObject(track.class_id, track.score / track.found)
            for number, track in enumerate(self._tracks, start=1)
        }

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next frame depends on; empty before the first frame."""
        if self.size is None:
            return {}
        # a row and a channel of zeros come first, since no tensor of a state is empty
        rows = [(0.0, 0.0, 0.0, 0.0), *map(astuple, self._tracks)]
        features, labels = zip(*self._memory, strict=True)
        return {
            "features": torch.stack(features),
            "labels": F.pad(torch.stack(labels), (1, 0)),
            "tracks": torch.tensor(rows, dtype=torch.float64),
            "size": torch.tensor(self.size),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state()` of a tracker with the same settings.

        Raises:
            ValueError: the state is invalid.
        """
        self._memory, self._tracks, self.size = [], [], None
        if not state:
            return
        check_state(state, _FORMS)
        rows = state["tracks"][1:].tolist()
        self._tracks = [Track(int(row[0]), row[1], int(row[2]), int(row[3])) for row in rows]
        if state["labels"].shape[3] != 1 + len(self._live()):
            raise ValueError(f"labels have {state['labels'].shape[3]} channels, for {len(self._live())} tracks")
        self._memory = [
            # views would hold the whole stack
            (features.to(self.device, copy=True), labels[..., 1:].to(self.device, copy=True))
            for features, labels in zip(state["features"], state["labels"], strict=True)
        ]
        height, width = state["size"].tolist()
        self.size = (height, width)

    def _live(self) -> list[int]:
        """Return the IDs that have not ended."""
        return [number for number, track in enumerate(self._tracks, start=1) if track.missed >= 0]

    def _track_frame(self, objects: Objects, features: Tensor, valid: Share) -> np.ndarray:
        """Return the IDs (H, W) uint8 of a frame with features (C, h, w)."""
        things = np.isin(objects.classes, self._things)
        objects, numbers = separate_objects(
            objects.select(np.flatnonzero(things & (objects.scores >= self._min_score)))
        )
        # cells of padding show nothing, and would match one another
        features, valid = crop_to_image(features, valid)
        target, lengths = unit_features(features)
        check_finite(lengths)
        grid = (features.shape[-2], features.shape[-1])
        shares = cell_shares(torch.from_numpy(numbers).to(self.device), len(objects), grid, valid)  # (h, w, N)
        live = self._live()
        tracks = [self._tracks[number - 1] for number in live]
        # where each track should be in this frame
        past = _match(target, self._memory, self._search) if live else shares[..., :0]  # (h, w, M)
        is_same = np.array([[track.class_id] for track in tracks], np.int64).reshape(-1, 1) == objects.classes  # (M, N)
        # with features that hardly differ, an object overlaps its last mask more than the propagated one
        last = self._memory[-1][1] if live else past
        now = shares.permute(2, 0, 1)
        iou = torch.maximum(soft_iou(past.permute(2, 0, 1), now), soft_iou(last.permute(2, 0, 1), now)).cpu().numpy()
        pairs = match_objects(iou, is_same)
        ids = np.zeros(1 + len(objects), np.uint8)
        for place, found in pairs:
            ids[1 + found] = live[place]
            # what is found replaces what was propagated, so that drift does not add up
            past[..., place] = shares[..., found]
        new = np.flatnonzero(ids[1:] == 0)
        self._start_tracks(objects.classes[new])
        ids[1 + new] = np.arange(len(self._tracks) - len(new), len(self._tracks)) + 1
        self._count_frame(tracks, ids[1:].tolist(), objects.scores.tolist())
        kept = [place for place, track in enumerate(tracks) if track.missed >= 0]
        self._remember(target, past[..., kept], shares[..., new.tolist()], kept)
        return ids[numbers]

    def _start_tracks(self, classes: np.ndarray) -> None:
        """Add a track for each new object, of some classes (N,).

        Raises:
            UserError: masks of 8 bits do not hold all IDs.
        """
        self._tracks += [Track(class_id) for class_id in classes.tolist()]
        if len(self._tracks) > MAX_IDS:
            raise UserError(
                f"The video has at least {len(self._tracks)} objects, and masks of 8 bits hold {MAX_IDS}. Set a higher "
                f"mode.min_score (now {self._min_score}) or mode.keep (now {self._keep}), or divide the video."
            )

    def _count_frame(self, tracks: Sequence[Track], ids: Sequence[int], scores: Sequence[float]) -> None:
        """Count a frame with the IDs of its objects, and end those of the earlier `tracks` that are missed too long."""
        for track in tracks:
            track.missed += 1
        for number, score in zip(ids, scores, strict=True):
            track = self._tracks[number - 1]
            track.score += score
            track.found += 1
            track.missed = 0
        for track in tracks:
            if track.missed > self._keep:
                track.missed = -1

    def _remember(self, target: Tensor, labels: Tensor, new: Tensor, kept: Sequence[int]) -> None:
        """Store a frame, and bring the frames in memory to its channels.

        The masks of new objects are propagated back. Otherwise the frames in which the model missed an object would
        count as evidence that it is absent, and the object would get another ID in each frame.

        Args:
            target: features (h, w, C) of the frame.
            labels: shares (h, w, M) of the remaining tracks.
            new: shares (h, w, N) of new objects.
            kept: places of the remaining tracks, among those before.
        """
        memory = []
        for features, before in self._memory:
            added = _match(features, [(target, new)], self._search) if new.shape[2] else new
            memory.append((features, torch.cat([before[..., kept], added], dim=2)))
        self._memory = [*memory, (target, torch.cat([labels, new], dim=2))]
        if len(self._memory) > self._search.context:
            del self._memory[self._find_spare()]

    def _find_spare(self) -> int:
        """Return the oldest frame in memory that is not the one in which a track that was not found is largest."""
        missed = [channel for channel, number in enumerate(self._live()) if self._tracks[number - 1].missed]
        # a hidden object would be forgotten with the last frame that shows it well
        areas = torch.stack([labels[..., missed].sum((0, 1)) for _, labels in self._memory])  # (F, missed)
        needed = set(areas.argmax(0).tolist())
        return next((place for place in range(len(self._memory) - 1) if place not in needed), 0)


def separate_objects(objects: Objects) -> tuple[Objects, np.ndarray]:
    """Return the objects that better ones cover by at most half, best first, and a map (H, W) of their numbers from 1.

    A pixel of several objects belongs to the one of the highest score.
    """
    numbers = np.zeros(objects.size, np.int64)
    kept: list[int] = []
    # best first: what a better object covers is no longer visible, and the order of equal scores is fixed
    for place in np.argsort(-objects.scores, kind="stable").tolist():
        visible = objects.masks[place].to_mask(objects.size) & (numbers == 0)
        if objects.areas[place] and np.count_nonzero(visible) >= _MIN_VISIBLE * objects.areas[place]:
            kept.append(place)
            numbers[visible] = len(kept)
    return objects.select(kept), numbers


def cell_shares(numbers: Tensor, count: int, grid: tuple[int, int], valid: Share) -> Tensor:
    """Return the share (h, w, N) of each cell that is covered by each of N objects, from a map (H, W) of numbers."""
    shares = torch.zeros(count, *grid, device=numbers.device)
    for number in range(count):  # all at once would take N frames
        shares[number] = area_mean((numbers == number + 1)[None].float(), grid, valid)[0]
    return shares.permute(1, 2, 0).contiguous()


def _match(target: Tensor, frames: Sequence[ContextFrame], settings: MatchSettings) -> Tensor:
    with torch.autocast(target.device.type, enabled=False):  # half precision would create ties
        return match(target, frames, settings)
