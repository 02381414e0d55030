"""Bipartite matching of queries and classes by minimum cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dinoseg.core.shapes import MaskOutputs
from dinoseg.losses.labelled import UNLABELLED
from dinoseg.losses.points import random_points, sample_labels, sample_logits
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.transfer import sent

HOPELESS = 1e8  # replaces non-finite costs, so that the loss itself becomes non-finite instead of the matching failing


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

    Raises:
        UserError: an image has more classes than there are queries.
    """
    class_ids = _present(target, num_classes)  # (B, M)
    image = torch.arange(len(target), device=target.device)
    costs = []
    for layer in layers:
        points = random_points(len(target), num_points, target.device)
        parts = pair_costs(layer, sample_labels(target, image, points), class_ids, points, valid)
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
    image, wanted, *of_layers = sent(torch.from_numpy(np.array(rows, np.int64)), target.device)
    return Matched(image, wanted, of_layers)


def pair_costs(
    layer: MaskOutputs, labels: Tensor, classes: Tensor, points: Tensor, valid: tuple[float, float]
) -> dict[str, Tensor]:
    """Return the costs (B, Q, M) of assigning each query to each class: `class`, `mask` and `dice`.

    They are minus the class probability, the mean binary cross-entropy, and the dice loss over the labelled points.

    Args:
        layer: class and mask logits.
        labels: class ids (B, P) at the points.
        classes: class ids (B, M), padded with -1.
        points: (B, P, 2).
        valid: share of the masks' height and width that the image covers.
    """
    logits = sample_logits(at_least_float32(layer.mask_logits), points, valid)  # (B, Q, P)
    labelled = (labels != UNLABELLED).to(logits.dtype)[..., None]  # (B, P, 1)
    inside = (labels[..., None] == classes[:, None]).to(logits.dtype)  # (B, P, M)
    shares = at_least_float32(layer.class_logits).softmax(-1)
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


def occurring(target: Tensor, num_classes: int) -> Tensor:
    """Return which classes occur (B, K) bool in each image of `target` (B, H, W)."""
    ids = target.flatten(1)
    present = torch.zeros(len(ids), num_classes + 1, dtype=torch.bool, device=ids.device)
    return present.scatter_(1, ids.where(ids != UNLABELLED, num_classes), True)[:, :num_classes]


def _present(target: Tensor, num_classes: int) -> Tensor:
    """Return the classes that occur in each image (B, M), ascending and padded with -1.

    On a CPU, M is the maximum number of classes of any image; elsewhere it is K, since a count would synchronise.
    """
    present = occurring(target, num_classes)
    classes = torch.arange(num_classes, device=target.device).where(present, num_classes)
    if classes.device.type == "cpu":
        longest = int(present.sum(1).amax()) if len(classes) else 0
        classes = classes.sort(1).values[:, :longest]
    return classes.where(classes < num_classes, -1)


def _check_queries(classes: np.ndarray, names: Sequence[str], num_queries: int, num_classes: int) -> None:
    for name, count in zip(names, (classes >= 0).sum(1), strict=True):
        if count > num_queries:
            raise UserError(
                f"head.num_queries={num_queries}: {name} has {count} classes, and each needs its own query. Set "
                f"head.num_queries to {num_classes}, the number of classes, or more."
            )
