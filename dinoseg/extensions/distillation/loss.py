"""Distillation loss: divergence of class scores from a teacher's (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.full_resolution import Vjp, pixel_sums
from dinoseg.losses.points import sample_maps
from dinoseg.utils.devices import to_device

_INSIDE, _OUTSIDE = 0, 255


@dataclass(frozen=True)
class TeacherView:
    """A teacher's class scores of a whole image, and the position of a view in this image.

    Args:
        scores: (K, h, w), a grid of cells that cover the image.
        valid: the share of the grid's height and width that the image covers, as in `Prediction`.
        place: (2, 3) float32, maps a pixel (x, y, 1) of the view to image coordinates. These range from -1 at the
            left and upper border to 1 at the right and lower one.
    """

    scores: Tensor
    valid: tuple[float, float]
    place: Tensor

    @classmethod
    def of(cls, scores: Tensor, valid: tuple[float, float], matrix: np.ndarray, size: tuple[int, int]) -> "TeacherView":
        """Return the scores for a view of an image of `size` (H, W).

        `matrix` (3, 3) maps pixels (x, y, 1) of the image to the view.
        """
        height, width = size
        to_share = np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1]])
        return cls(scores, valid, torch.from_numpy(to_share @ np.linalg.inv(matrix)).float())

    def to(self, device: torch.device) -> "TeacherView":
        """Return a float32 copy on `device`."""
        return replace(self, scores=to_device(self.scores, device).float(), place=to_device(self.place, device))

    def at(self, rows: slice, columns: slice) -> Tensor:
        """Return the scores (K, r, c) of some pixels of the view, bilinear between cells, border values outside."""
        share = self.place.new_tensor(self.valid[::-1])
        places = (self._coordinates(rows, columns) + 1) * share - 1  # grid coordinates, -1..1 from border to border
        return sample_maps(self.scores[None], places[None])[0]

    def inside(self, size: tuple[int, int]) -> Tensor:
        """Return which pixels (H, W) bool of a view of `size` lie inside the image."""
        return (self._coordinates(slice(0, size[0]), slice(0, size[1])).abs() <= 1).all(-1)

    def _coordinates(self, rows: slice, columns: slice) -> Tensor:
        """Return the image coordinates of pixels, (r, c, 2): x and y."""
        y, x = (torch.arange(run.start, run.stop, device=self.place.device).float() for run in (rows, columns))
        along, down, start = self.place.unbind(1)
        return x[None, :, None] * along + y[:, None, None] * down + start


def divergence(
    prediction: Prediction, seen: Sequence[TeacherView], size: tuple[int, int], temperature: float
) -> Tensor:
    """Return T^2 KL(teacher || student), averaged over the pixels of a view inside its image, then over the views.

    Views without such pixels contribute 0.

    With scores t and s it is T^2 sum_k p_k (log p_k - log q_k), p = softmax(t / T) and q = softmax(s / T). The factor
    T^2 makes the gradient magnitude independent of the temperature. Both scores are upsampled to the views tile by
    tile.

    Args:
        prediction: of the views (B).
        seen: the teacher's scores of each view.
        size: (H, W) of the views.
        temperature: T.
    """

    def term(both: Tensor, _: Tensor, counted: Tensor) -> tuple[Tensor, Vjp]:
        student, teacher = (part.log_softmax(0) for part in (both / temperature).chunk(2))
        shares = teacher.exp()
        costs = (shares * (teacher - student)).sum(0)

        def pull(upstream: Tensor) -> Tensor:
            return (student.exp() - shares).mul_(temperature * upstream[0] * counted)

        return temperature**2 * (costs * counted).sum()[None], pull

    inside = torch.stack([each.inside(size) for each in seen])
    num_inside = inside.sum((1, 2), keepdim=True).clamp(min=1)  # (B, 1, 1)
    weights = (1 / (len(seen) * num_inside.to(seen[0].place.dtype))).expand(inside.shape)
    masks = torch.where(inside, _INSIDE, _OUTSIDE).to(torch.uint8)
    return pixel_sums(
        prediction,
        Batch.of_masks(masks),
        _OUTSIDE,
        term,
        weights=weights,
        first_alone=True,
        extra=lambda image, rows, columns: seen[image].at(rows, columns),
    )[0]
