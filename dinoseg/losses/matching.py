"""Which query answers for which class of an image: the cheapest assignment of one to the other."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dinoseg.losses.labelled import UNLABELLED
from dinoseg.losses.points import random_points, sample_labels, sample_logits
from dinoseg.precision import at_least_float32
from dinoseg.shapes import MaskOutputs

HOPELESS = 1e8  # stands for a cost that is not finite, so that the loss itself can tell


@torch.no_grad()
def match(
    layers: Sequence[MaskOutputs],
    target: Tensor,
    classes: Sequence[Sequence[int]],
    factors: Mapping[str, float],
    num_points: int,
    valid: tuple[float, float],
) -> list[list[np.ndarray]]:
    """Return, for each layer and image, the query of each of the image's classes.

    The assignment is the one of least summed cost (as in Cheng et al., arXiv 2112.01527). Every image and layer
    draws its own uniform points; all costs go to the host in one transfer.

    Args:
        layers: of one set of images, each with at least as many queries as an image has classes.
        target: class ids (B, H, W), UNLABELLED where nothing counts.
        classes: the classes of each image.
        factors: of the costs `class`, `mask` and `dice`.
        num_points: points at which masks are compared.
        valid: share of the masks' height and width that the image covers.
    """
    padded = _padded(classes, target.device)
    image = torch.arange(len(target), device=target.device)
    costs = []
    for layer in layers:
        points = random_points(len(target), num_points, target.device)
        parts = pair_costs(layer, sample_labels(target, image, points), padded, points, valid)
        costs.append(torch.stack([factors[name] * part for name, part in parts.items()]).sum(0))
    on_host = torch.stack(costs).nan_to_num(HOPELESS, HOPELESS, -HOPELESS).cpu().numpy()  # (layers, B, Q, M)
    return [
        [
            linear_sum_assignment(image_costs[:, : len(ids)].T)[1]
            for image_costs, ids in zip(layer_costs, classes, strict=True)
        ]
        for layer_costs in on_host
    ]


def pair_costs(
    layer: MaskOutputs, labels: Tensor, classes: Tensor, points: Tensor, valid: tuple[float, float]
) -> dict[str, Tensor]:
    """Return the costs (B, Q, M) of each query answering for each class: `class`, `mask` and `dice`.

    Minus the class probability; the mean binary cross-entropy and the dice loss over the labelled points.

    Args:
        layer: class and mask logits.
        labels: class ids (B, P) at the points.
        classes: class ids (B, M), filled up with -1.
        points: (B, P, 2).
        valid: share of the masks' height and width that the image covers.
    """
    logits = sample_logits(at_least_float32(layer.mask_logits), points, valid)  # (B, Q, P)
    labelled = (labels != UNLABELLED).to(logits.dtype)[..., None]  # (B, P, 1)
    inside = (labels[..., None] == classes[:, None]).to(logits.dtype)  # (B, P, M)
    shares = at_least_float32(layer.class_logits).softmax(-1)
    asked = classes.clamp(min=0)[:, None].expand(-1, shares.shape[1], -1)  # (B, Q, M)
    # log(1 + e^x) - x t is the binary cross-entropy of logit x and label t
    entropy = F.softplus(logits) @ labelled - logits @ inside
    masks = logits.sigmoid()
    areas = masks @ labelled + inside.sum(1)[:, None]
    return {
        "class": -shares.gather(2, asked),
        "mask": entropy / labelled.sum(1, keepdim=True).clamp(min=1),
        "dice": 1 - (2 * (masks @ inside) + 1) / (areas + 1),
    }


def _padded(classes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max((len(ids) for ids in classes), default=0)
    rows = [[*ids, *[-1] * (longest - len(ids))] for ids in classes]
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), longest)
