"""Tasks of single objects: instance and panoptic segmentation by heads that predict masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.objects import Objects
from dinoseg.core.sample_maps import MapKind
from dinoseg.core.targets import MaskTargets
from dinoseg.core.task import ObjectTask
from dinoseg.extensions.objects.checks import check_maps, check_objects
from dinoseg.extensions.objects.finding import (
    MAX_INSTANCES,
    OVERLAP_THRESHOLD,
    SCORE_THRESHOLD,
    find_instances,
    find_segments,
)
from dinoseg.extensions.objects.fusing import fuse_instances
from dinoseg.extensions.objects.joining import join_instances, join_segments
from dinoseg.extensions.objects.reading.things import advise_on_background, find_things
from dinoseg.extensions.objects.targets import object_targets
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural, Share, check_annotations
from dinoseg.utils.wording import format_override, join_names

_PARTS = "loss=mask_classification with head=eomt, head=pmt or head=mask2former"
_CERTAIN = 64.0  # logit whose sigmoid is 1 in any precision


class ThingTask(ObjectTask):
    """Base class of tasks whose classes are things, which have objects, and stuff.

    Args:
        classes: names in the order of their ids.
        things: names of the classes that have objects; None: all but the background.
        background: name or id of the class that is no object; None: there is none.

    Raises:
        UserError: a name is no class, or no class is a thing.
    """

    def __init__(
        self, classes: Sequence[str], things: Sequence[str] | None = None, background: str | Natural | None = None
    ) -> None:
        if isinstance(background, str) and background not in classes:
            raise UserError(
                f"data.background={format_override(background)} is not a class. Name one of {join_names(classes)}; or "
                "null if there is none."
            )
        self.num_classes = len(classes)
        self.background = classes.index(background) if isinstance(background, str) else background
        self.things = find_things(classes, things, self.background)

    def check_data(self, name: str, kinds: Mapping[str, MapKind], classes: Sequence[str], loss: Any) -> None:
        """Refuse data without objects, or with those of other classes."""
        check_maps(name, kinds, classes, self.things)

    def check_objects(self, name: str, data: Any) -> None:
        """Refuse data without any object."""
        check_objects(name, data)


class InstanceTask(ThingTask):
    """Objects of things, each with a mask, a class and a score; they may overlap.

    A pixel's class is the most probable one of the objects there; the background if it is that no object is there.

    Args:
        classes: names in the order of their ids.
        things: names of the classes that have objects; None: all but the background.
        background: name or id of the class that is no object; None: there is none.
        score: of validations that selects the best checkpoint, unless `trainer.score` is set.
        max_instances: number of pairs of a query and a class that are instances of an image or window, those of the
            highest class probability.

    Raises:
        UserError: a name is no class, no class is a thing, or there are no instances.
    """

    overlap = True
    scored_file = ("coco", "results.json", "coco_instances")
    advice = f"hparam=instance, or {_PARTS}"
    eval_metrics = ("instance_ap",)

    @check_annotations
    def __init__(
        self,
        classes: Sequence[str],
        things: Sequence[str] | None = None,
        background: str | Natural | None = None,
        score: str = "AP",
        *,
        max_instances: Count = MAX_INSTANCES,
    ) -> None:
        super().__init__(classes, things, background)
        self.score = score
        self.max_instances = max_instances
        # an exported graph finds its objects by these values, without this class
        self.graph_options = {
            "things": sorted(self.things),
            "background": self.background,
            "max_instances": max_instances,
            "score_threshold": None,
            "overlap_threshold": None,
        }

    def targets(self, mask: Tensor, maps: Mapping[str, Tensor], num_classes: int, ignore_index: int) -> MaskTargets:
        """Return the objects of things but crowds, whose pixels have no label."""
        return object_targets(mask, maps[OBJECTS], num_classes, ignore_index)

    def pixel_scores(self, scores: Tensor) -> Tensor:
        """Return the scores of things; that of the background is 1 minus the highest, and other stuff has none."""
        if self.background is None:
            return scores
        things = sorted(self.things)
        of_things = scores[:, things]
        pixels = torch.zeros_like(scores)
        # 1 - highest score of a thing; clamped, since sums over queries may exceed 1
        pixels[:, self.background] = (1 - of_things.amax(1)).clamp(min=0)
        pixels[:, things] = of_things
        return pixels

    def class_masks(self, logits: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return the masks of things, and one of the whole image that scores 0.5 for the background.

        1 minus the highest score is above that score where it is below 0.5.
        """
        if self.background is None:
            return logits, shares
        things = sorted(self.things)
        of_things = torch.zeros_like(F.pad(shares, (0, 0, 0, 1)))
        # classes of stuff have no share: their pixels are the background's
        of_things[:, :-1, things] = shares[:, :, things]
        of_things[:, -1, self.background] = 0.5
        return F.pad(logits, (0, 0, 0, 0, 0, 1), value=_CERTAIN), of_things

    def check_data(self, name: str, kinds: Mapping[str, MapKind], classes: Sequence[str], loss: Any) -> None:
        """Refuse data without objects, those of other classes, and a loss without pixels outside of them."""
        super().check_data(name, kinds, classes, loss)
        parts = [part for part in loss.modules() if isinstance(part, MaskClassification)]  # a sum has terms
        if len(self.things) == len(classes) and any(part.targets.excludes_ignored for part in parts):
            raise UserError(
                f"task=instance: every class of {name} has objects, so that no pixel outside of objects has a label, "
                "and loss.criterion.ignored=excluded leaves out those without one: masks would grow over all of them. "
                f"{advise_on_background(classes) or 'Set loss.criterion.ignored=background'}."
            )

    def find_objects(
        self, class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], valid: tuple[float, float]
    ) -> list[Objects]:
        """Return the objects of each image, best first."""
        return find_instances(
            class_logits,
            mask_logits,
            size,
            valid,
            self.num_classes,
            self.things,
            max_instances=self.max_instances,
        )

    def join_objects(self, parts: Sequence[tuple[Objects, int, int]], size: tuple[int, int]) -> Objects:
        """Return the objects of an image from those of overlapping parts."""
        return join_instances(parts, size)

    def fuse_objects(self, members: Sequence[Objects]) -> Objects:
        """Return the fused instances, see `fuse_instances`."""
        return fuse_instances(members, self.max_instances)


class PanopticTask(ThingTask):
    """A segment of each pixel: an object of a thing, or a class of stuff as a whole.

    Args:
        classes: names in the order of their ids.
        things: names of the classes that have objects; None: all but the background.
        background: name or id of the class that is no object, which is stuff; None: there is none.
        score_threshold: class probability above which a query becomes a segment.
        overlap_threshold: share of the pixels of its mask that a query must win against the others.
        score: of validations that selects the best checkpoint, unless `trainer.score` is set.

    Raises:
        UserError: a name is no class, no class is a thing, or a threshold is out of range.
    """

    overlap = False
    scored_file = ("panoptic", "panoptic.json", "coco_panoptic")
    advice = f"hparam=panoptic, or {_PARTS}"
    eval_metrics = ("panoptic_quality",)

    @check_annotations
    def __init__(
        self,
        classes: Sequence[str],
        things: Sequence[str] | None = None,
        background: str | Natural | None = None,
        score: str = "PQ",
        *,
        score_threshold: Share = SCORE_THRESHOLD,
        overlap_threshold: Share = OVERLAP_THRESHOLD,
    ) -> None:
        super().__init__(classes, things, background)
        self.score = score
        self.score_threshold, self.overlap_threshold = score_threshold, overlap_threshold
        self.graph_options = {
            "things": sorted(self.things),
            "background": None,  # a class of stuff
            "max_instances": None,
            "score_threshold": score_threshold,
            "overlap_threshold": overlap_threshold,
        }

    def targets(self, mask: Tensor, maps: Mapping[str, Tensor], num_classes: int, ignore_index: int) -> MaskTargets:
        """Return the objects of things but crowds, whose pixels have no label, and the classes of stuff."""
        # one target for a class of stuff, however many regions it has
        stuff = {*range(num_classes)}.difference(self.things)
        return object_targets(mask, maps[OBJECTS], num_classes, ignore_index, stuff)

    def find_objects(
        self, class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], valid: tuple[float, float]
    ) -> list[Objects]:
        """Return the segments of each image, which do not overlap."""
        return find_segments(
            class_logits,
            mask_logits,
            size,
            valid,
            self.num_classes,
            self.things,
            score_threshold=self.score_threshold,
            overlap_threshold=self.overlap_threshold,
        )

    def join_objects(self, parts: Sequence[tuple[Objects, int, int]], size: tuple[int, int]) -> Objects:
        """Return the segments of an image from those of overlapping parts."""
        return join_segments(parts, size, self.things)
