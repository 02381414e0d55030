"""Metric of the centre lines of thin structures: clDice and skeleton recall; no torch."""

from collections.abc import Sequence

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage
from dinoseg.metrics.counts import mean_defined, ratio
from dinoseg.metrics.outlines import drop_ignored
from dinoseg.metrics.thinning import thin_masks
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural, check_annotations


class ClDice(Metric):
    """Mean over the classes of clDice (Shit et al., CVPR 2021), pooled over images, and of its skeleton recall.

    Skeleton recall, or topology sensitivity, is the share of the reference's skeleton inside the prediction. Topology
    precision is that of the prediction's skeleton inside the reference, and clDice the harmonic mean of both. Ignored
    pixels belong to no class on either side. If `ignore_index` is one of the classes, that class is not scored.

    Args:
        classes: ids of the classes with thin structures; None: all but class 0.

    Raises:
        UserError: `classes` is empty, or, by `check_classes` and `count`, holds an id that is no class.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import ClDice, LabelledImage, PredictedImage
        >>> thread, cut = np.zeros((2, 8, 8), np.uint8)
        >>> thread[4], cut[4, :4] = 1, 1
        >>> metric = ClDice()
        >>> metric.score([metric.count(PredictedImage(cut), LabelledImage(thread, num_classes=2))])
        {'cldice': 0.6666666666666666, 'skeleton_recall': 0.5}
    """

    scores = {"cldice": "max", "skeleton_recall": "max"}

    @check_annotations
    def __init__(self, classes: Sequence[Natural] | None = None) -> None:
        if classes is not None and not classes:
            raise UserError("classes=[]: name at least one class, or give None for all but class 0.")
        self.classes = classes

    def check_classes(self, num_classes: int, *, has_layers: bool = False) -> None:
        """Refuse ids that are no class, and a choice of layers, which are all scored."""
        chosen = [*(self.classes or ())]
        if chosen and has_layers:
            raise UserError(f"classes={chosen}: each class has its own mask and score. Leave it out.")
        if max(chosen, default=0) >= num_classes:
            raise UserError(f"classes={chosen}: give ids of classes, from 0 to {num_classes - 1}.")

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return for each class (4, K) int64 the pixels of skeletons: predicted and true, those in the other, and all.

        The rows are the predicted skeleton in the reference, the predicted skeleton, the reference's skeleton in the
        prediction, and the reference's skeleton.
        """
        background = sample.num_classes
        self.check_classes(background)
        chosen = range(1, background) if self.classes is None else self.classes
        scored = [index for index in chosen if index != sample.ignore_index]
        reference, predicted, _ = drop_ignored(prediction, sample)
        for ids in (reference, predicted):
            ids[~np.isin(ids, scored)] = background
        pixels = np.zeros((4, background + 1), np.int64)
        # a skeleton pixel counts on the other side where that has the same class
        for row, mask, other in ((0, predicted, reference), (2, reference, predicted)):
            skeleton = thin_masks(mask, background)
            pixels[row] = np.bincount(skeleton[skeleton == other], minlength=background + 1)
            pixels[row + 1] = np.bincount(skeleton.ravel(), minlength=background + 1)
        return {"skeletons": pixels[:, :background]}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the means over the classes that either side holds, and of the recall over those of the reference."""
        return {name: mean_defined(values) for name, values in self.per_class(sums).items()}

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return both scores of each class."""
        found, predicted, covered, held = np.moveaxis(sums["skeletons"].astype(float), -2, 0)
        # 2 P S / (P + S) with P = found / predicted and S = covered / held, multiplied out: no division by an empty
        # skeleton
        both = found * held + covered * predicted
        # skeletons that nowhere meet score 0, and are not undefined
        cldice = ratio(2 * found * covered, np.where((both == 0) & (predicted + held > 0), 1, both))
        return {"cldice": cldice, "skeleton_recall": ratio(covered, held)}
