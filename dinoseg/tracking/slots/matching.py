"""Which slot is which: from frame to frame, and to the objects of a mask by overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.geometry import upsample
from dinoseg.metrics.assignment import best_assignment
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of

_AT_ONCE = 2**25  # numbers of the upsampled masks held at a time: 128 MiB
_STAY = 1e-6  # what two assignments may differ by and still be taken for equal


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return the overlap (A, B) of soft masks (A, h, w) and (B, h, w): sum of products over sum of maxima (DINOSAVi).

    For masks of zeros and ones this is their IoU; a soft mask's with itself is below 1. Of two empty masks it is 0.
    """
    rows = []
    for mask in first:
        products = torch.einsum("hw,bhw->b", mask, second)
        rows.append(products / torch.maximum(mask, second).sum((1, 2)).clamp(min=1e-12))
    return torch.stack(rows)


def soft_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU (A, B) of soft masks (A, h, w) and (B, h, w) in 0..1: sum of minima over sum of maxima.

    For masks of zeros and ones this is the IoU itself; of two empty masks it is 0.
    """
    rows = []
    for mask in first:  # one at a time: all pairs of masks at once would take A x B grids
        least = torch.minimum(mask, second).sum((1, 2))
        rows.append(least / (mask.sum() + second.sum((1, 2)) - least).clamp(min=1e-12))
    return torch.stack(rows)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine similarities (A, B) of vectors (A, D) and (B, D)."""
    return F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T


@dataclass(frozen=True)
class Correspondence:
    """Which slots of a frame the S slots of the first one have become.

    On the CPU and in double precision, which not every device has: that is where assignments are made.

    Args:
        matrix: (S, S) how much of each slot of the first frame each slot of this one is; rows sum to 1.
        successors: (S,) the slot of this frame that each slot of the first one is, by the assignment of greatest sum.
    """

    matrix: Tensor
    successors: Tensor

    @classmethod
    def start(cls, num_slots: int) -> "Correspondence":
        """Return that of the first frame with itself."""
        return cls(torch.eye(num_slots, dtype=torch.float64), torch.arange(num_slots))

    def step(self, similarity: Tensor, temperature: float) -> "Correspondence":
        """Return the correspondence one frame further on.

        A softmax of each row says what share of a slot goes where, and these are multiplied on. Over hundreds of frames
        that forgets what set similar slots apart: between assignments that differ by less than 1e-6, the shares of this
        step alone decide.

        Args:
            similarity: (S, S) of the slots of the last frame and those of this one.
            temperature: divides it.
        """
        edges = (similarity.cpu().double() / temperature).softmax(1)
        matrix = self.matrix @ edges
        scores = matrix + _STAY * edges[self.successors]
        return Correspondence(matrix, torch.from_numpy(best_assignment(scores.numpy())))


def owners(masks: Tensor, shares: Tensor, ids: Sequence[int]) -> list[int]:
    """Return for each of S slots the id of what it serves.

    It is what the slot's mask has the greatest IoU with, the earlier of equals, so several slots may serve one object.
    An object that none would serve is then given one, see `give`.

    Args:
        masks: of the slots (S, h, w), in 0..1.
        shares: of each cell (1 + objects, h, w) that the background and the objects cover.
        ids: of these, 0 first.

    Raises:
        UserError: there are fewer slots than the objects and the background.
    """
    overlap = soft_iou(masks, shares).cpu().numpy()  # (S, 1 + objects)
    served = [ids[best] for best in overlap.argmax(1)]
    give(served, {label: column for label, column in zip(ids, overlap.T, strict=True) if label not in served and label})
    return served


def give(served: list[int], overlap: Mapping[int, np.ndarray]) -> None:
    """Write objects into `served`, the ids of what S slots serve (0 = background): one slot for each object.

    The greatest overlap of all goes first. A slot is taken from the background; from objects only where the background
    has a single one; and the last slot from neither.

    Args:
        served: (S,).
        overlap: by each new object's id, with every slot (S,).

    Raises:
        UserError: no slot can be taken.
    """
    waiting = set(overlap)
    while waiting:
        spare = [slot for slot, label in enumerate(served) if served.count(label) > 1]
        free = [slot for slot in spare if served[slot] == 0] or spare
        if not free:
            objects = count_of(waiting | set(served) - {0}, "object")
            raise UserError(
                f"{count_of(served, 'slot')} cannot follow {objects}: each needs one of its own, and so does the "
                "background. Use slots.lock_on=true, which makes slots for the objects of the first frame and "
                "slots.background_slots for later ones; or a model of more slots (head.num_slots)."
            )
        pairs = [(slot, label) for slot in free for label in sorted(waiting)]
        slot, label = max(pairs, key=lambda pair: overlap[pair[1]][pair[0]])
        served[slot] = label
        waiting.remove(label)


def winners(masks: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return (H, W) int64: the slot whose soft mask of (S, h, w), upsampled bilinearly, is the greatest.

    With slots that serve one object the object is where the greatest of its slots wins, which is the same as comparing
    the objects' maxima.
    """
    best = masks.new_full(size, -torch.inf)
    index = torch.zeros(size, dtype=torch.int64, device=masks.device)
    at_once = max(1, _AT_ONCE // (size[0] * size[1]))
    for number, part in enumerate(masks.split(at_once)):
        scores, slots = upsample(part[None], size, valid)[0].max(0)
        better = scores > best
        index = torch.where(better, slots + number * at_once, index)
        best = torch.where(better, scores, best)
    return index
