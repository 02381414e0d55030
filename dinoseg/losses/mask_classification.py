"""Mask classification loss: one query predicts each target of an image, such as a class or object, with its mask."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dinoseg.core.contracts import Loss, safe_divide
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction, StackedSamples
from dinoseg.core.targets import NO_TARGET, UNLABELLED, MaskTargets
from dinoseg.core.task import ObjectTask
from dinoseg.losses.labelled import checked_factors
from dinoseg.losses.points import (
    random_points,
    sample_labels,
    sample_logits,
    sample_membership,
    uncertain_points,
)
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Count, NotNegative, Range, Share, check_annotations

logger = logging.getLogger(__name__)
Oversampling = Annotated[float, Range("a number of at least 1", 1)]
TERMS = ("class", "mask", "dice")
FACTORS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
Ignored = Literal["excluded", "background"]
Interpolation = Literal["nearest", "bilinear"]
HOPELESS = 1e8  # replaces non-finite costs, so that the loss itself becomes non-finite instead of the matching failing


@dataclass(frozen=True)
class PointTargets:
    """Sampling of target masks at points.

    Args:
        ignored: see `MaskClassification`.
        interpolation: see `MaskClassification`.
    """

    ignored: Ignored = "excluded"
    interpolation: Interpolation = "nearest"

    @property
    def excludes_ignored(self) -> bool:
        """Return whether ignored pixels count nowhere, rather than as background of all masks."""
        return self.ignored == "excluded"

    @property
    def fades_outside(self) -> bool:
        """Return whether maps fade to 0 beyond the centres of the outermost cells, as in `grid_sample`."""
        return self.interpolation == "bilinear"

    def at(
        self, targets: MaskTargets, image: Tensor, points: Tensor, numbers: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the shares (R, P, M) of targets at points (R, P, 2), and the weight of each point (R, P).

        A weight is 1, or less for points on ignored pixels if these are excluded.

        Args:
            targets: of the images.
            image: image index of each row of points (R,).
            points: (R, P, 2).
            numbers: of the targets (R, M).
            dtype: of the result.
        """
        # objects may overlap, so that a target lies in one of several layers; classes have a single one
        layers = targets.ids.unbind(1)  # (B, H, W)
        if self.interpolation == "nearest":
            ids = [sample_labels(layer, image, points) for layer in layers]
            inside = reduce(torch.logical_or, (each[..., None] == numbers[:, None] for each in ids))
            weights = ids[0] != UNLABELLED
            return inside.to(dtype), (weights if self.excludes_ignored else torch.ones_like(weights)).to(dtype)
        shares = reduce(torch.add, (sample_membership(layer, image, points, numbers, dtype) for layer in layers))
        weights = shares.new_ones(shares.shape[:2])
        if self.excludes_ignored:
            labelled = (layers[0] != UNLABELLED).long()
            weights = sample_membership(labelled, image, points, numbers.new_ones(len(numbers), 1), dtype)[..., 0]
        return shares, weights


@dataclass
class Matched:
    """Matching of N targets of the images with queries of a layer.

    Args:
        image: (N,) index of the image of each, ascending.
        target: (N,) index of the target in its image, ascending there.
        query: (N,) index of the query.
        share: of all targets of the images; below 1 if an image has more targets than queries.
    """

    image: Tensor
    target: Tensor
    query: Tensor
    share: float


@torch.no_grad()
def match(
    layers: Sequence[MaskOutputs],
    targets: MaskTargets,
    factors: Mapping[str, float],
    num_points: int,
    valid: tuple[float, float],
    reading: PointTargets,
) -> tuple[list[Matched], np.ndarray]:
    """Return the matching of each layer, and the number of targets of each image (B,).

    The assignment minimises the summed cost (as in Cheng et al., arXiv 2112.01527). Of more targets than queries, it
    matches as many as there are queries. Every image and layer samples its own uniform points. The device is
    synchronised once: all costs and their targets are transferred to the host together.

    Args:
        layers: outputs of several layers for the same images.
        targets: of the images.
        factors: of the costs `class`, `mask` and `dice`.
        num_points: number of points at which masks are compared.
        valid: share of the masks' height and width that the image covers.
        reading: how target masks are read at points.
    """
    numbers = targets.present  # (B, M)
    image = torch.arange(len(numbers), device=numbers.device)
    costs = []
    for layer in layers:
        # one set of points for all queries and targets of an image (mask2former/modeling/matcher.py): 1024 x 1024
        # pixels are 84 times as many as the 12,544 points of the recipes
        points = random_points(len(numbers), num_points, numbers.device)
        logits = sample_logits(at_least_float32(layer.mask_logits), points, valid, fading=reading.fades_outside)
        at_points = reading.at(targets, image, points, numbers, logits.dtype)
        parts = pair_costs(logits, layer.class_logits, targets.classes, *at_points)
        costs.append(torch.stack([factors[name] * part for name, part in parts.items()]).sum(0))
    all_costs = torch.stack(costs).nan_to_num(HOPELESS, HOPELESS, -HOPELESS)  # (layers, B, Q, M)
    # the Hungarian algorithm runs on the host: one copy for all layers and images, since each copy waits for the device
    on_host = torch.cat([numbers.flatten().to(all_costs), all_costs.flatten()]).cpu().numpy()
    present = on_host[: numbers.numel()].reshape(numbers.shape) != NO_TARGET
    assigned = [_assign(each, present) for each in on_host[numbers.numel() :].reshape(all_costs.shape)]
    counts = present.sum(1)
    # mask and dice terms are divided by all targets, as in Mask2Former; EoMT divides by the matched ones
    share = assigned[0].shape[1] / max(1, int(counts.sum()))
    pairs = to_device(torch.from_numpy(np.stack(assigned)), numbers.device)
    return [Matched(image, target, query, share) for image, target, query in pairs], counts


def _assign(costs: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return images, targets and queries (3, N) of the assignment of least cost.

    Args:
        costs: (B, Q, M).
        present: (B, M), whether there is a target.
    """
    # concatenate needs at least one array
    rows = [np.zeros((3, 0), np.int64)]
    for image, (of_image, columns) in enumerate(zip(costs, map(np.flatnonzero, present), strict=True)):
        # as many pairs as the shorter side has, so more targets than queries need no case of their own
        targets, queries = linear_sum_assignment(of_image[:, columns].T)
        rows.append(np.stack([np.full(len(queries), image), columns[targets], queries]))
    return np.concatenate(rows, axis=1)


def pair_costs(
    logits: Tensor, class_logits: Tensor, classes: Tensor, inside: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Return the costs (B, Q, M) of assigning each query to each target: `class`, `mask` and `dice`.

    They are minus the class probability, the mean binary cross-entropy, and the dice loss over the points.

    Args:
        logits: of the masks at the points (B, Q, P).
        class_logits: (B, Q, K) or (B, Q, K + 1).
        classes: class ids (B, M) of the targets, padded with NO_TARGET.
        inside: shares of the targets at the points (B, P, M).
        weights: of the points (B, P), 0 for those that do not count.
    """
    # all pairs by matrix products over the points: (B, Q, P) x (B, P, M), and never (B, Q, M, P)
    labelled = weights[..., None]  # (B, P, 1)
    shares = at_least_float32(class_logits).softmax(-1)
    index = classes.clamp(min=0)[:, None].expand(-1, shares.shape[1], -1)  # (B, Q, M)
    # log(1 + e^x) - x t is the binary cross-entropy of logit x and label t
    entropy = F.softplus(logits) @ labelled - logits @ inside
    masks = logits.sigmoid()
    areas = masks @ labelled + inside.sum(1)[:, None]
    return {
        # the probability and not its logarithm, which is commensurable with the others (DETR, arXiv 2005.12872, section
        # 3.1)
        "class": -shares.gather(2, index),
        "mask": entropy / labelled.sum(1, keepdim=True).clamp(min=1),
        # 1 - (2 sum p t + 1) / (sum p + sum t + 1), as in the original
        "dice": 1 - (2 * (masks @ inside) + 1) / (areas + 1),
    }


class Sampling(TypedDict):
    """Options of `uncertain_points`."""

    num_points: int
    oversample: float
    importance: float


class MaskClassification(Loss):
    """Mask2Former's loss (Cheng et al., arXiv 2112.01527, sections 3.3 and 4.1) for the targets of a task.

    In the last layer and in each of `aux`, queries are matched with the targets of the image: the classes that occur in
    a semantic mask, or objects. Matched masks get binary cross-entropy and dice loss at sampled points; all queries get
    cross-entropy on their class or "no object".

    Of more objects than queries, those that fit best are matched; the mask and dice terms are still divided by the
    number of all. The class term of a step of several micro-batches then counts its images as if all were matched.

    By default two details differ from the original. Ignored pixels count nowhere, and in an image without labels,
    queries are not trained to predict "no object". The label of a point is that of the pixel it lies in, and logits
    are constant beyond the centres of the outermost cells. `ignored=background interpolation=bilinear` is the original
    (facebookresearch/Mask2Former, mask2former/modeling/criterion.py and matcher.py; huggingface/transformers,
    modeling_mask2former.py, with which tue-mps/eomt trains). Over several ranks, the class term is the mean over the
    queries of all of them, whereas the original averages the means of the ranks.

    Without a no-object column, unmatched queries have no class loss.

    In eval mode heads return no `aux`, so the value is that of the last layer only. train/loss, a sum over all
    layers, is therefore not comparable with val/loss.

    Args:
        class_weights: one weight (K,) per class, in the mean of the class term.
        ignore_index: mask value of unlabelled pixels.
        factors: of the terms `class`, `mask` and `dice`, in the matching as in the loss.
        no_object: class weight of "no object".
        num_points: points per mask.
        oversample: ratio of random candidates to points when selecting uncertain ones; at least 1.
        importance: share of the points that are selected as uncertain, in [0, 1].
        ignored: `excluded`: ignored pixels count nowhere; or `background`: they belong to no mask, count as such in
            every mask, and their points are sampled like any other. All queries of an image without labels are then
            trained to predict "no object".
        interpolation: how masks are read at points. `nearest`: the label of the pixel; or `bilinear`: shares of the
            four nearest pixels, 0 outside the image; logits then fade to 0 beyond the outermost cells too.
    """

    weight: Tensor
    needs = frozenset({"masks"})
    advice = (
        "Choose head=eomt, head=pmt, head=mask2former or head=mask2former_meta; or a loss on pixels, such as "
        "loss=cross_entropy or loss=ce_dice."
    )
    num_divisors = 3

    @check_annotations
    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int = 255,
        factors: Mapping[str, NotNegative] = FACTORS,
        no_object: NotNegative = 0.1,
        num_points: Count = 12544,
        oversample: Oversampling = 3.0,
        importance: Share = 0.75,
        ignored: Ignored = "excluded",
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.factors = checked_factors(factors, TERMS)
        self.no_object = no_object
        self.targets = PointTargets(ignored, interpolation)
        self.has_warned = False  # of more objects than queries
        self.sampling: Sampling = {"num_points": num_points, "oversample": oversample, "importance": importance}

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of all layers, and the last layer's terms.

        The mask and dice terms are means over the N target masks, the class term over the summed weights of the
        queries.

        Raises:
            UserError: the head predicts no masks, or an image has more classes than the head has queries.
        """
        _, terms = self._of_layers(prediction, batch)
        return self._sum_terms(terms), {name: term.detach() for name, term in terms[0].items()}

    def divisors(self, batch: Batch) -> Tensor:
        """Return (3,): number of target masks, their summed class weights, and number of images with a class loss."""
        targets = self._find_targets(batch)
        ids = torch.arange(len(self.weight), device=self.weight.device)
        counts = (targets.classes[..., None] == ids).sum(1)  # (B, K)
        return torch.stack([counts.sum(), (counts * self.weight).sum(), self._has_class_loss(targets).sum()])

    def _find_targets(self, batch: Batch) -> MaskTargets:
        mask = to_device(batch.mask, self.weight.device)
        maps = {name: to_device(values, self.weight.device) for name, values in batch.maps.items()}
        return self.task.targets(mask, maps, len(self.weight), self.ignore_index)

    def _has_class_loss(self, targets: MaskTargets) -> Tensor:
        """Return whether the queries of an image (B,) are trained to predict "no object"."""
        return targets.labelled if self.targets.excludes_ignored else torch.ones_like(targets.labelled)

    def step_loss(
        self, prediction: Prediction, batch: StackedSamples, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's share of the step loss, the loss of the batch itself, and the last layer's terms."""
        assert isinstance(batch, Batch)
        outputs, terms = self._of_layers(prediction, batch)
        batch_divisors = self.divisors(batch).to(divisors)
        # each term is a mean over the batch; times the batch's divisor it is a sum, which the divisor of the step
        # divides
        of_masks = safe_divide(batch_divisors[0], divisors[0])
        of_queries = safe_divide(
            *(self._query_weight(counts, outputs.class_logits) for counts in (batch_divisors, divisors))
        )
        shares = {"class": of_queries, "mask": of_masks, "dice": of_masks}
        part = self._sum_terms([{name: shares[name] * term for name, term in each.items()} for each in terms])
        return part, self._sum_terms(terms).detach(), {name: term.detach() for name, term in terms[0].items()}

    def _query_weight(self, counts: Tensor, class_logits: Tensor) -> Tensor:
        """Return the summed weights () of all queries, given `divisors` (3,)."""
        masks, weight, images = counts
        _, queries, columns = class_logits.shape
        # of more masks than queries, no query is left
        unmatched = (images * queries - masks).clamp(min=0)
        return weight + self.no_object * unmatched if columns > len(self.weight) else weight

    def _sum_terms(self, terms: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.stack([self.factors[name] * each[name] for each in terms for name in TERMS]).sum()

    def _of_layers(self, prediction: Prediction, batch: Batch) -> tuple[MaskOutputs, list[dict[str, Tensor]]]:
        """Return the outputs, and the terms of the last layer and of each of `aux`."""
        outputs = prediction.outputs
        if not isinstance(outputs, MaskOutputs):
            raise UserError(
                "mask_classification needs a head that predicts masks: mask2former or eomt. Or choose cross_entropy, "
                "which fits every head."
            )
        layers, targets = [outputs, *outputs.aux], self._find_targets(batch)
        points = self.sampling["num_points"]
        matched, counts = match(layers, targets, self.factors, points, prediction.valid, self.targets)
        self._check_queries(counts, batch.names, outputs.class_logits.shape[1])
        return outputs, [
            self._terms(layer, targets, each, prediction.valid) for layer, each in zip(layers, matched, strict=True)
        ]

    def _check_queries(self, counts: Sequence[int] | np.ndarray, names: Sequence[str], num_queries: int) -> None:
        """Refuse more classes than queries, and warn once of more objects."""
        for name, count in zip(names, counts, strict=True):
            if count > num_queries and not isinstance(self.task, ObjectTask):
                raise UserError(
                    f"num_queries={num_queries}: {name} has {count} classes, and each needs its own query. Give the "
                    f"head num_queries={len(self.weight)}, the number of classes, or more."
                )
            if count > num_queries and not self.has_warned:
                logger.warning(
                    "%s has %d target masks for %d queries: only those that fit best train the model, here and in any "
                    "other such image. Give the head num_queries=%d or more.",
                    *(name, count, num_queries, count),
                )
                self.has_warned = True

    def _terms(
        self, layer: MaskOutputs, targets: MaskTargets, matched: Matched, valid: tuple[float, float]
    ) -> dict[str, Tensor]:
        class_term = self._class_term(at_least_float32(layer.class_logits), targets, matched)
        masks = at_least_float32(layer.mask_logits[matched.image, matched.query])  # (N, h, w)
        # 0, and still a function of the masks: ranks wait for a gradient of every weight
        if not len(masks):
            return {"class": class_term, "mask": masks.sum(), "dice": masks.sum()}
        excluded = self.targets.excludes_ignored
        fading = self.targets.fades_outside
        # points near the border of a mask, where it is uncertain, say most about it (PointRend, arXiv 1912.08193)
        points = uncertain_points(
            masks.detach(), targets.ids[:, 0], matched.image, valid, excluded=excluded, fading=fading, **self.sampling
        )
        logits = sample_logits(masks[:, None], points, valid, fading=fading)[:, 0]
        wanted = targets.present[matched.image, matched.target][:, None]
        inside, weights = self.targets.at(targets, matched.image, points, wanted, logits.dtype)
        entropy, dice = mask_losses(logits, inside[..., 0], weights)
        return {"class": class_term, "mask": matched.share * entropy.mean(), "dice": matched.share * dice.mean()}

    def _class_term(self, logits: Tensor, targets: MaskTargets, matched: Matched) -> Tensor:
        """Return the class loss of the queries (B, Q), weighted by their target class.

        Images without labels count only if ignored pixels are background.
        """
        num_classes = len(self.weight)
        weights = self.weight.to(logits.dtype)
        unmatched = UNLABELLED
        if logits.shape[-1] == num_classes + 1:
            weights = torch.cat([weights, weights.new_full((1,), self.no_object)])
            unmatched = num_classes
        # UNLABELLED (-100) is the index that `cross_entropy` ignores
        default = torch.where(self._has_class_loss(targets), unmatched, UNLABELLED)
        wanted = default[:, None].repeat(1, logits.shape[1])
        wanted[matched.image, matched.query] = targets.classes[matched.image, matched.target]
        # a weighted mean, as by `reduction='mean'`, which is NaN where no query counts
        total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum")
        norm = torch.where(wanted == UNLABELLED, 0, weights[wanted.clamp(min=0)]).sum()
        return safe_divide(total, norm)


def mask_losses(logits: Tensor, inside: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the binary cross-entropy and the dice loss of each of N masks, over its points.

    Args:
        logits: (N, P).
        inside: share (N, P) of the target mask at each point, at most its weight.
        weights: of the points (N, P), 0 for those that do not count.
    """
    # an interpolated point may be partly ignored: its truth is the share of the mask in the labelled part
    truth = inside / torch.where(weights > 0, weights, 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, weights, reduction="none").sum(1)
    shares = logits.sigmoid()
    overlap, areas = (shares * inside).sum(1), (shares * weights).sum(1) + inside.sum(1)
    return entropy / weights.sum(1).clamp(min=1), 1 - (2 * overlap + 1) / (areas + 1)
