"""Weighted sum of losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Loss
from dinoseg.core.sample_maps import MapKind
from dinoseg.core.shapes import Prediction, StackedSamples
from dinoseg.losses.labelled import checked_factors
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.ranges import NotNegative, check_annotations


class WeightedSum(Loss):
    """Weighted sum of losses.

    Args:
        terms: maps names to factories of losses, called with `class_weights` if they accept them.
        factors: maps names to the factors of the terms; 0 switches a term off.
        class_weights: one weight (K,) per class; None if no term uses classes.
    """

    @check_annotations
    def __init__(
        self,
        terms: Mapping[str, Callable[..., Loss]],
        factors: Mapping[str, NotNegative],
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not terms or "weight" in terms:
            raise UserError(
                f"terms={list(terms)}: give at least one term, of any name but weight, such as ce and dice."
            )
        self.factors = checked_factors(factors, terms)
        self.losses = nn.ModuleList(_make(name, make, class_weights) for name, make in terms.items())
        self.needs = frozenset(name for loss in self._terms for name in loss.needs)
        self.advice = next((loss.advice for loss in self._terms if loss.needs), self.advice)
        layered = [name for name, loss in zip(terms, self._terms, strict=True) if "layers" in loss.needs]
        if 0 < len(layered) < len(terms):
            raise UserError(
                f"terms={list(terms)}: {', '.join(layered)} of task=multilabel cannot be added to terms of one class "
                "per pixel. Choose terms of one kind."
            )
        self.needs_maps = _join_maps(self._terms)
        self._set_divisors()

    def forward(self, prediction: Prediction, batch: StackedSamples) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum; each term's own value under its name; and `weight`, if the terms share one.

        Further parts of a term are named `<term>_<part>`.
        """
        prediction = _scoring_once(prediction)
        terms = [loss(prediction, batch) for loss in self._terms]
        value, parts = self._sum_terms([(value, value.detach(), term_parts) for value, term_parts in terms])
        first = terms[0][1]
        return value, parts if self.num_divisors > 1 or "weight" not in first else {"weight": first["weight"], **parts}

    def divisors(self, batch: Any) -> Tensor:
        """Return the concatenated divisors of the terms, or the single one that they share."""
        losses = self._terms if self.num_divisors > 1 else self._terms[:1]
        device = next(self.buffers(), torch.empty(0)).device
        return torch.cat([loss.divisors(batch).to(device, torch.float32) for loss in losses])

    def step_loss(
        self, prediction: Prediction, batch: StackedSamples, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's share of the step loss, the loss of the batch itself, and its parts by name."""
        if self.num_divisors == 1:
            return super().step_loss(prediction, batch, divisors)
        prediction = _scoring_once(prediction)
        given = divisors.split([loss.num_divisors for loss in self._terms])
        terms = [
            loss.step_loss(prediction, batch, loss_divisors)
            for loss, loss_divisors in zip(self._terms, given, strict=True)
        ]
        part, parts = self._sum_terms(terms)
        alone = torch.stack(
            [factor * value for factor, (_, value, _) in zip(self.factors.values(), terms, strict=True)]
        )
        return part, alone.sum(), parts

    def _sum_terms(self, terms: Sequence[tuple[Tensor, Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the terms' first values, and their second values and parts by name."""
        parts: dict[str, Tensor] = {}
        for name, (_, alone, term_parts) in zip(self.factors, terms, strict=True):
            parts[name] = alone
            parts |= {f"{name}_{key}": part for key, part in term_parts.items() if key != "weight"}
        values = [factor * part for factor, (part, _, _) in zip(self.factors.values(), terms, strict=True)]
        return torch.stack(values).sum(), parts

    def _set_divisors(self) -> None:
        """Set the divisors, and `sums_over_batch`: whether the loss of a batch is not the mean over its parts.

        The latter also holds if a term's divisor is unknown before the forward pass, since an approximate one
        averages it.
        """
        keys = {loss.divisor for loss in self._terms if loss.num_divisors == 1}
        first, counts = self._terms[0], [loss.num_divisors for loss in self._terms]
        joined = len(counts) == 1 or (len(keys) == 1 and None not in keys and set(counts) == {1})
        self.num_divisors = first.num_divisors if joined else sum(counts)
        self.divisor = first.divisor if joined else None
        sums = any(loss.sums_over_batch for loss in self._terms)
        self.sums_over_batch = sums or (not joined and None in keys)

    @property
    def _terms(self) -> list[Loss]:
        return [loss for loss in self.losses if isinstance(loss, Loss)]


def _join_maps(losses: Sequence[Loss]) -> dict[str, MapKind]:
    needed: dict[str, MapKind] = {}
    for name, kind in (entry for loss in losses for entry in loss.needs_maps.items()):
        if needed.setdefault(name, kind) != kind:
            raise UserError(f"Two terms read the map {name}: as {needed[name]} and as {kind}. Rename one of them.")
    return needed


def _make(name: str, make: Callable[..., Loss], class_weights: Tensor | None) -> Loss:
    """Return a term; its errors name its parameters by their place below `terms`."""
    if isinstance(make, Loss):
        raise UserError(f"terms.{name} is a {type(make).__name__} that is built already. Set `_partial_: true` there.")
    parameters = signature(make).parameters
    weighs = "class_weights" in parameters
    if weighs and class_weights is None:
        raise UserError(
            f"terms.{name} weights classes, but this loss has none. Remove the term, or add it to a loss on labels, "
            "such as ce_dice."
        )
    with name_parameters({parameter: f"terms.{name}.{parameter}" for parameter in parameters}):
        return make(class_weights=class_weights) if weighs else make()


def _scoring_once(prediction: Prediction) -> Prediction:
    """Return the prediction with cached scores: at mask size, they are the largest tensor of a step."""
    scores: dict[tuple[int, int], Tensor] = {}

    def to_pixels(outputs: object, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        if size not in scores:
            scores[size] = prediction.to_pixels(outputs, size, valid)
        return scores[size]

    return replace(prediction, to_pixels=to_pixels)
