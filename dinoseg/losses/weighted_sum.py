"""A weighted sum of losses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor, nn

from dinoseg.contracts import Loss
from dinoseg.errors import UserError
from dinoseg.losses.factors import checked_factors
from dinoseg.shapes import Batch, ClipBatch, Prediction


class WeightedSum(Loss):
    """The sum over terms of factor times loss.

    Args:
        terms: name to what makes the loss, called with `class_weights` where it takes them.
        factors: name to what the term's loss is multiplied by.
        class_weights: one weight (K,) per class; None where no term is about classes.
    """

    def __init__(
        self,
        terms: Mapping[str, Callable[..., Loss]],
        factors: Mapping[str, float],
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not terms or "weight" in terms:
            raise UserError(
                f"loss.criterion.terms={list(terms)}: give at least one term, of any name but weight, such as "
                f"ce and dice in loss=ce_dice."
            )
        self.factors = checked_factors(factors, terms)
        self.losses = nn.ModuleList(_make(name, make, class_weights) for name, make in terms.items())
        self.needs_masks = any(loss.needs_masks for loss in self.losses)
        self.needs_slots = any(loss.needs_slots for loss in self.losses)
        self.needs_similarity = any(loss.needs_similarity for loss in self.losses)
        self.needs_carried = any(loss.needs_carried for loss in self.losses)
        self.sums_over_batch = any(loss.sums_over_batch for loss in self.losses)

    def forward(self, prediction: Prediction, batch: Batch | ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum; each term's own value under its name; and `weight`, that of the first term.

        Further parts of a term are called `<term>_<part>`. A term whose own weight is of another kind is still
        averaged over batches by the first one's.
        """
        prediction = _scoring_once(prediction)
        values: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for (name, factor), loss in zip(self.factors.items(), self.losses, strict=True):
            value, term_parts = loss(prediction, batch)
            values.append(factor * value)
            parts.setdefault("weight", term_parts["weight"])
            parts[name] = value.detach()
            parts |= {f"{name}_{key}": part for key, part in term_parts.items() if key != "weight"}
        return torch.stack(values).sum(), parts


def _make(name: str, make: Callable[..., Loss], class_weights: Tensor | None) -> Loss:
    """Return a term, its complaints about keys moved to where the keys stand."""
    weighs = "class_weights" in signature(make).parameters
    if weighs and class_weights is None:
        raise UserError(
            f"loss.criterion.terms.{name} weighs classes, and this loss has none. Remove the term, or add it to a loss "
            f"on labels, such as loss=ce_dice."
        )
    try:
        return make(class_weights=class_weights) if weighs else make()
    except UserError as error:
        raise UserError(str(error).replace("loss.criterion.", f"loss.criterion.terms.{name}.")) from None


def _scoring_once(prediction: Prediction) -> Prediction:
    """Return the prediction with its scores kept: brought to the masks' size, they are the largest tensor of a step."""
    scores: dict[tuple[int, int], Tensor] = {}

    def to_pixels(outputs: object, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        if size not in scores:
            scores[size] = prediction.to_pixels(outputs, size, valid)
        return scores[size]

    return replace(prediction, to_pixels=to_pixels)
