"""Matching of slots between frames, and of slots to labelled objects by mask overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.geometry import upsample
from dinoseg.extensions.tracking.grid.assignment import best_assignment
from dinoseg.extensions.tracking.grid.cells import soft_iou
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of

_AT_ONCE = 2**25  # elements of upsampled masks in memory at once: 128 MiB
_STAY = 1e-6  # tolerance within which two assignments count as equal


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return the overlap (A, B) of soft masks (A, h, w) and (B, h, w): sum of products over sum of maxima (DINOSAVi).

    For binary masks this is the IoU. A soft mask's overlap with itself is below 1; that of two empty masks is 0.
    """
    rows = []
    for mask in first:
        # one mask at a time: all pairs at once would take A x B grids
        products = torch.einsum("hw,bhw->b", mask, second)
        rows.append(products / torch.maximum(mask, second).sum((1, 2)).clamp(min=1e-12))
    return torch.stack(rows)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine similarities (A, B) of vectors (A, D) and (B, D)."""
    return F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T


@dataclass(frozen=True)
class Correspondence:
    """Correspondence between the S slots of the first frame and those of the current frame.

    Stored on the CPU in double precision, where assignments are computed; not every device supports double precision.

    Args:
        matrix: (S, S) fraction of each slot of the first frame in each slot of this frame; rows sum to 1.
        successors: (S,) this frame's slot for each slot of the first frame, by the assignment with the greatest sum.
    """

    matrix: Tensor
    successors: Tensor

    @classmethod
    def start(cls, num_slots: int) -> "Correspondence":
        """Return the identity correspondence of the first frame."""
        return cls(torch.eye(num_slots, dtype=torch.float64), torch.arange(num_slots))

    def step(self, similarity: Tensor, temperature: float) -> "Correspondence":
        """Return the correspondence one frame later.

        The softmax of each row of similarities is a transition matrix, and these are multiplied over time. Over
        hundreds of frames the product forgets what distinguishes similar slots. Assignments that differ by less than
        1e-6 are therefore decided by this step alone.

        Args:
            similarity: (S, S) between the slots of the last frame and those of this frame.
            temperature: divisor of the similarities.
        """
        # DINOSAVi: P_t = P_(t-1) softmax(similarity / 0.05), and the assignment of its greatest sum (Hungarian method)
        edges = (similarity.cpu().double() / temperature).softmax(1)
        matrix = self.matrix @ edges
        # row s: this step alone, from the slot that s had in the last frame
        scores = matrix + _STAY * edges[self.successors]
        return Correspondence(matrix, torch.from_numpy(best_assignment(scores.numpy())))


def owners(masks: Tensor, shares: Tensor, ids: Sequence[int]) -> list[int]:
    """Return the ID that each of S slots is assigned to.

    Each slot is assigned to the ID with the greatest mask IoU (the first of equal ones), so several slots may share an
    object. Objects without a slot are then given one, see `give`.

    Args:
        masks: soft masks of the slots (S, h, w), in 0..1.
        shares: fraction (1 + objects, h, w) of each cell that the background and the objects cover.
        ids: their IDs, 0 first.

    Raises:
        UserError: there are fewer slots than objects plus background.
    """
    overlap = soft_iou(masks, shares).cpu().numpy()  # (S, 1 + objects)
    served = [ids[best] for best in overlap.argmax(1)]
    assign_slots(
        served, {label: column for label, column in zip(ids, overlap.T, strict=True) if label not in served and label}
    )
    return served


def assign_slots(served: list[int], overlap: Mapping[int, np.ndarray]) -> None:
    """Assign one slot to each object in `overlap`, by changing `served`, the IDs of S slots (0 = background).

    Objects are assigned in order of greatest overlap. Slots are taken from the background; only if the background has a
    single slot, they are taken from objects. The last slot of an ID is never taken.

    Args:
        served: (S,) IDs, modified in-place.
        overlap: overlap (S,) with every slot, by the ID of each new object.

    Raises:
        UserError: no slot can be taken.
    """
    waiting = set(overlap)
    while waiting:
        # anew for each object, since every slot that is taken changes which are spare
        spare = [slot for slot, label in enumerate(served) if served.count(label) > 1]
        free = [slot for slot in spare if served[slot] == 0] or spare
        if not free:
            objects = count_of(waiting | set(served) - {0}, "object")
            raise UserError(
                f"{count_of(served, 'slot')} cannot track {objects}: each object and the background need their own "
                "slot. Use slots.lock_on=true, which creates slots for the objects of the first frame and "
                "slots.background_slots for later ones; or a model with more slots (head.num_slots)."
            )
        pairs = [(slot, label) for slot in free for label in sorted(waiting)]
        slot, label = max(pairs, key=lambda pair: overlap[pair[1]][pair[0]])
        served[slot] = label
        waiting.remove(label)


def winners(masks: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the slot (H, W) int64 whose soft mask of (S, h, w), upsampled bilinearly, is the greatest at each pixel.

    With several slots per object, this is equivalent to comparing the maxima over each object's slots.
    """
    best = masks.new_full(size, -torch.inf)
    index = torch.zeros(size, dtype=torch.int64, device=masks.device)
    # upsampled masks of all slots would take 4 S H W bytes; the best so far is enough
    at_once = max(1, _AT_ONCE // (size[0] * size[1]))
    for number, part in enumerate(masks.split(at_once)):
        scores, slots = upsample(part[None], size, valid)[0].max(0)
        better = scores > best
        index = torch.where(better, slots + number * at_once, index)
        best = torch.where(better, scores, best)
    return index
