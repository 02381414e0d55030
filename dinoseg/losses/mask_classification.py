"""Mask classification loss: one query predicts each class of an image, with its mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dinoseg.core.contracts import Loss, safe_divide
from dinoseg.core.shapes import Batch, ClipBatch, MaskOutputs, Prediction
from dinoseg.losses.labelled import UNLABELLED, checked_factors, labels
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

Oversampling = Annotated[float, Range("a number of at least 1", 1)]
TERMS = ("class", "mask", "dice")
FACTORS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
Ignored = Literal["excluded", "background"]
Interpolation = Literal["nearest", "bilinear"]
HOPELESS = 1e8  # replaces non-finite costs, so that the loss itself becomes non-finite instead of the matching failing


@dataclass(frozen=True)
class PointTargets:
    """How target masks are read at points.

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
        self, target: Tensor, image: Tensor, points: Tensor, classes: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the shares (N, P, M) of `classes` (N, M) at points (N, P, 2), and the weight of each point (N, P).

        A weight is 1, or less for points on ignored pixels if these are excluded.
        """
        if self.interpolation == "nearest":
            ids = sample_labels(target, image, points)
            shares = ids[..., None] == classes[:, None]
            weights = ids != UNLABELLED
            return shares.to(dtype), (weights if self.excludes_ignored else torch.ones_like(weights)).to(dtype)
        shares = sample_membership(target, image, points, classes, dtype)
        weights = shares.new_ones(shares.shape[:2])
        if self.excludes_ignored:
            labelled = (target != UNLABELLED).long()
            weights = sample_membership(labelled, image, points, classes.new_ones(len(classes), 1), dtype)[..., 0]
        return shares, weights


@dataclass
class Matched:
    """Matching of N pairs of an image and a class in it with queries."""

    image: Tensor  # (N,) ascending
    wanted: Tensor  # (N,) class ids, ascending in an image
    queries: Sequence[Tensor]  # (N,) for each layer


@torch.no_grad()
def match(
    layers: Sequence[MaskOutputs],
    target: Tensor,
    names: Sequence[str],
    num_classes: int,
    factors: Mapping[str, float],
    num_points: int,
    valid: tuple[float, float],
    targets: PointTargets,
) -> Matched:
    """Return the matched query, in each layer, for each class that occurs in an image.

    The assignment minimises the summed cost (as in Cheng et al., arXiv 2112.01527). Every image and layer samples its
    own uniform points. The device is synchronised once: all costs and their classes are transferred to the host
    together.

    Args:
        layers: outputs of several layers for the same images.
        target: class ids (B, H, W), UNLABELLED for ignored pixels.
        names: of the images.
        num_classes: K.
        factors: of the costs `class`, `mask` and `dice`.
        num_points: number of points at which masks are compared.
        valid: share of the masks' height and width that the image covers.
        targets: how target masks are read at points.

    Raises:
        UserError: an image has more classes than there are queries.
    """
    class_ids = _present(target, num_classes)  # (B, M)
    image = torch.arange(len(target), device=target.device)
    costs = []
    for layer in layers:
        points = random_points(len(target), num_points, target.device)
        logits = sample_logits(at_least_float32(layer.mask_logits), points, valid, fading=targets.fades_outside)
        parts = pair_costs(
            logits, layer.class_logits, class_ids, *targets.at(target, image, points, class_ids, logits.dtype)
        )
        costs.append(torch.stack([factors[name] * part for name, part in parts.items()]).sum(0))
    all_costs = torch.stack(costs).nan_to_num(HOPELESS, HOPELESS, -HOPELESS)  # (layers, B, Q, M)
    on_host = torch.cat([class_ids.flatten().to(all_costs), all_costs.flatten()]).cpu().numpy()
    classes = on_host[: class_ids.numel()].reshape(class_ids.shape)
    _check_queries(classes, names, all_costs.shape[2], num_classes)
    image_ids, columns = np.nonzero(classes >= 0)
    rows = [image_ids, classes[image_ids, columns]]
    for layer_costs in on_host[class_ids.numel() :].reshape(all_costs.shape):
        pairs = zip(layer_costs, classes, strict=True)
        queries = [linear_sum_assignment(each[:, ids >= 0].T)[1] for each, ids in pairs]
        rows.append(np.concatenate([np.zeros(0), *queries]))  # concatenate needs at least one array
    image, wanted, *of_layers = to_device(torch.from_numpy(np.array(rows, np.int64)), target.device)
    return Matched(image, wanted, of_layers)


def pair_costs(
    logits: Tensor, class_logits: Tensor, classes: Tensor, inside: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Return the costs (B, Q, M) of assigning each query to each class: `class`, `mask` and `dice`.

    They are minus the class probability, the mean binary cross-entropy, and the dice loss over the points.

    Args:
        logits: of the masks at the points (B, Q, P).
        class_logits: (B, Q, K) or (B, Q, K + 1).
        classes: class ids (B, M), padded with -1.
        inside: shares of the classes at the points (B, P, M).
        weights: of the points (B, P), 0 for those that do not count.
    """
    labelled = weights[..., None]  # (B, P, 1)
    shares = at_least_float32(class_logits).softmax(-1)
    index = classes.clamp(min=0)[:, None].expand(-1, shares.shape[1], -1)  # (B, Q, M)
    # log(1 + e^x) - x t is the binary cross-entropy of logit x and label t
    entropy = F.softplus(logits) @ labelled - logits @ inside
    masks = logits.sigmoid()
    areas = masks @ labelled + inside.sum(1)[:, None]
    return {
        "class": -shares.gather(2, index),
        "mask": entropy / labelled.sum(1, keepdim=True).clamp(min=1),
        "dice": 1 - (2 * (masks @ inside) + 1) / (areas + 1),
    }


def present_classes(target: Tensor, num_classes: int) -> Tensor:
    """Return which classes occur (B, K) bool in each image of `target` (B, H, W)."""
    ids = target.flatten(1)
    present = torch.zeros(len(ids), num_classes + 1, dtype=torch.bool, device=ids.device)
    return present.scatter_(1, ids.where(ids != UNLABELLED, num_classes), True)[:, :num_classes]


def _present(target: Tensor, num_classes: int) -> Tensor:
    """Return the classes that occur in each image (B, M), ascending and padded with -1.

    On a CPU, M is the maximum number of classes of any image; elsewhere it is K, since a count would synchronise.
    """
    present = present_classes(target, num_classes)
    classes = torch.arange(num_classes, device=target.device).where(present, num_classes)
    if classes.device.type == "cpu":
        longest = int(present.sum(1).amax()) if len(classes) else 0
        classes = classes.sort(1).values[:, :longest]
    return classes.where(classes < num_classes, -1)


def _check_queries(classes: np.ndarray, names: Sequence[str], num_queries: int, num_classes: int) -> None:
    for name, count in zip(names, (classes >= 0).sum(1), strict=True):
        if count > num_queries:
            raise UserError(
                f"num_queries={num_queries}: {name} has {count} classes, and each needs its own query. Give the head "
                f"num_queries={num_classes}, the number of classes, or more."
            )


class Sampling(TypedDict):
    """Options of `uncertain_points`."""

    num_points: int
    oversample: float
    importance: float


class MaskClassification(Loss):
    """Mask2Former's loss (Cheng et al., arXiv 2112.01527, sections 3.3 and 4.1) for the classes of semantic masks.

    In the last layer and in each of `aux`, queries are matched with the classes that occur in the image. Matched
    masks get binary cross-entropy and dice loss at sampled points; all queries get cross-entropy on their class or
    "no object".

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
    needs_masks = True
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
        target = labels(to_device(batch.mask, self.weight.device), self.ignore_index)
        present = present_classes(target, len(self.weight))
        images = present.new_full((), len(present), dtype=torch.long)
        if self.targets.excludes_ignored:
            images = present.any(1).sum()
        return torch.stack([present.sum(), (present * self.weight).sum(), images])

    def step_loss(
        self, prediction: Prediction, batch: Batch | ClipBatch, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's share of the step loss, the loss of the batch itself, and the last layer's terms."""
        assert isinstance(batch, Batch)
        outputs, terms = self._of_layers(prediction, batch)
        batch_divisors = self.divisors(batch).to(divisors)
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
        return weight + self.no_object * (images * queries - masks) if columns > len(self.weight) else weight

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
        layers, target = [outputs, *outputs.aux], labels(batch.mask, self.ignore_index)
        points = self.sampling["num_points"]
        matched = match(
            layers, target, batch.names, len(self.weight), self.factors, points, prediction.valid, self.targets
        )
        return outputs, [
            self._terms(layer, target, matched, query, prediction.valid)
            for layer, query in zip(layers, matched.queries, strict=True)
        ]

    def _terms(
        self, layer: MaskOutputs, target: Tensor, matched: Matched, query: Tensor, valid: tuple[float, float]
    ) -> dict[str, Tensor]:
        class_term = self._class_term(at_least_float32(layer.class_logits), matched, query)
        masks = at_least_float32(layer.mask_logits[matched.image, query])  # (N, h, w)
        if not len(masks):
            return {"class": class_term, "mask": masks.sum(), "dice": masks.sum()}
        excluded = self.targets.excludes_ignored
        fading = self.targets.fades_outside
        points = uncertain_points(
            masks.detach(), target, matched.image, valid, excluded=excluded, fading=fading, **self.sampling
        )
        logits = sample_logits(masks[:, None], points, valid, fading=fading)[:, 0]
        inside, weights = self.targets.at(target, matched.image, points, matched.wanted[:, None], logits.dtype)
        entropy, dice = mask_losses(logits, inside[..., 0], weights)
        return {"class": class_term, "mask": entropy.mean(), "dice": dice.mean()}

    def _class_term(self, logits: Tensor, matched: Matched, query: Tensor) -> Tensor:
        """Return the class loss of the queries (B, Q), weighted by their target class.

        Images without labels count only if ignored pixels are background.
        """
        num_classes = len(self.weight)
        weights = self.weight.to(logits.dtype)
        unmatched = UNLABELLED
        if logits.shape[-1] == num_classes + 1:
            weights = torch.cat([weights, weights.new_full((1,), self.no_object)])
            unmatched = num_classes
        default = UNLABELLED if self.targets.excludes_ignored else unmatched
        wanted = torch.full(logits.shape[:2], default, device=logits.device)
        wanted.index_fill_(0, matched.image, unmatched)  # indexed assignment synchronises with CUDA in torch 2.11
        wanted[matched.image, query] = matched.wanted
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
    truth = inside / torch.where(weights > 0, weights, 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, weights, reduction="none").sum(1)
    shares = logits.sigmoid()
    overlap, areas = (shares * inside).sum(1), (shares * weights).sum(1) + inside.sum(1)
    return entropy / weights.sum(1).clamp(min=1), 1 - (2 * overlap + 1) / (areas + 1)
