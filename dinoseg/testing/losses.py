"""Conformance of losses."""

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.geometry import upsample
from dinoseg.core.sample_maps import make_random_maps
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction, collect_tensors, tree_map
from dinoseg.models.heads.semantic import semantic_map
from dinoseg.testing.modules import are_close, check_class, fixed_seed, require
from dinoseg.training.step import batch_loss
from dinoseg.utils.wording import join_names

SIZE = (8, 12)  # (H, W) of the masks and of the outputs
IMAGES = 4


@dataclass(frozen=True)
class LossCase:
    """A loss under test, with the outputs and labels that it takes. A subclass gives outputs of another kind.

    Args:
        loss: the loss.
        num_classes: K.
        ignore_index: id of ignored pixels.
    """

    loss: Loss
    num_classes: int
    ignore_index: int
    provides: ClassVar[Set[str]] = frozenset({"masks", "layers"})  # names of outputs, see `Loss.needs`
    has_labels: ClassVar[bool] = True  # whether the loss reads the masks of a batch

    @property
    def name(self) -> str:
        """Return the name of the class."""
        return type(self.loss).__name__

    def outputs(self, count: int = IMAGES, size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float32) -> Any:
        """Return random outputs of a head for the loss; those that it may train require gradients."""
        draw = self.make_draw(count, dtype)
        if "masks" in self.loss.needs:
            queries = self.num_classes + 2
            layers = [MaskOutputs(draw(queries, self.num_classes + 1), draw(queries, *size)) for _ in range(2)]
            return replace(layers[0], aux=layers[1:])
        return draw(self.num_classes, *size)

    def make_draw(self, count: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        """Return a function that maps a shape to a random tensor (count, *shape), which requires gradients."""
        rng = torch.Generator().manual_seed(5)
        return lambda *shape: torch.randn(count, *shape, generator=rng).to(dtype).requires_grad_()

    def prediction(self, outputs: Any) -> Prediction:
        """Return the prediction of a head with these outputs."""
        if "masks" in self.loss.needs:
            return Prediction(outputs, SIZE, (1.0, 1.0), semantic_map, mixture=True)
        return Prediction(outputs, SIZE, (1.0, 1.0), upsample, grid=outputs if isinstance(outputs, Tensor) else None)

    def batch(self, count: int = IMAGES, size: tuple[int, int] = SIZE) -> Any:
        """Return a batch whose right half is ignored; with four images, the labels of two more are cut."""
        names = [str(number) for number in range(count)]
        rng = torch.Generator().manual_seed(7)
        values, layers = (2, [self.num_classes]) if "layers" in self.loss.needs else (self.num_classes, [])
        mask = torch.randint(0, values, (count, *layers, *size), generator=rng, dtype=torch.uint8)
        mask[..., size[1] // 2 :] = self.ignore_index
        mask[1:2] = self.ignore_index
        mask[2:3, ..., 2:, :] = self.ignore_index
        maps = make_random_maps(self.loss.needs_maps, count, size, self.num_classes, rng)
        return Batch(torch.zeros(count, 3, *size, dtype=torch.uint8), mask, names, maps)

    def run(self, outputs: Any, batch: Any, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the result of the loss; its random numbers depend on the seed alone."""
        with fixed_seed(seed):
            return self.loss(self.prediction(outputs), batch)

    @property
    def is_random(self) -> bool:
        """Return whether the loss samples points, so that only expected values can be compared."""
        outputs, batch = self.outputs(), self.batch()
        return not torch.equal(self.run(outputs, batch)[0], self.run(outputs, batch, seed=1)[0])


def check_loss(
    make_loss: Callable[..., Loss], *, num_classes: int = 3, ignore_index: int = 255, case: type[LossCase] = LossCase
) -> None:
    """Check that a loss keeps the contract of `dinoseg.core.contracts.Loss`.

    Args:
        make_loss: the class, or a `functools.partial` of it. It is called with `class_weights` if it takes them.
        num_classes: K.
        ignore_index: id of ignored pixels in the masks; the loss must know the same.
        case: gives the loss its outputs: class scores, or the masks that it `needs`. A loss on outputs of another kind
            has a case of its own.

    Raises:
        AssertionError: it breaks a rule; the message names the rule, the result and the remedy.

    Examples:
        >>> from functools import partial
        >>> from dinoseg.losses.focal import Focal
        >>> from dinoseg.testing import check_loss
        >>> check_loss(partial(Focal, gamma=1.0))
    """
    weights = {"class_weights": torch.linspace(0.5, 2, num_classes)}
    takes_weights = "class_weights" in signature(make_loss).parameters
    loss = make_loss(**weights) if takes_weights else make_loss()
    check_class(loss, Loss)
    tested = case(loss, num_classes, ignore_index)
    for rule in LOSS_RULES:
        rule(tested)


def collect_gradients(value: Tensor, outputs: Any) -> list[Tensor]:
    """Return the gradient of each output that requires one, zeros where it has none."""
    trained = [leaf for leaf in collect_tensors(outputs) if leaf.requires_grad]
    return list(torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True))


def check_needed_outputs(case: LossCase) -> None:
    """Check that the outputs under test are those that the loss needs."""
    loss, kind = case.loss, type(case).__name__
    require(
        loss.needs <= case.provides,
        f"{case.name}: `needs` must name outputs of {kind} ({join_names(sorted(case.provides))}), but it is "
        f"{join_names(sorted(loss.needs))}; correct a name, or give check_loss the case= of a head that provides them.",
    )


def check_buffers(case: LossCase) -> None:
    """Check that tensors such as class weights move to a device with the loss."""
    plain = [
        f"{type(module).__name__}.{key}"
        for module in case.loss.modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    require(
        not plain,
        f"{case.name}: tensors must move to a device with the loss, but {', '.join(plain)} would stay; use "
        "self.register_buffer(name, tensor, persistent=False).",
    )


def check_result(case: LossCase) -> None:
    """Check the kinds of the result, on one image whose mask has another size than the outputs."""
    result = case.run(case.outputs(1), case.batch(1, (9, 13)))
    require(
        isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict),
        f"{case.name}: a loss must return its mean and a dict of named parts, but it returned a "
        f"{type(result).__name__}; return (mean, {{}}) if there are no parts.",
    )
    value, parts = result
    require(
        value.shape == () and value.requires_grad and bool(value.isfinite()),
        f"{case.name}: the mean must be a finite scalar with a gradient, but it is {value}; average over all labelled "
        "pixels at the size of the mask, and detach nothing.",
    )
    odd = [name for name, part in parts.items() if not isinstance(part, Tensor) or part.shape or part.requires_grad]
    require(
        not odd,
        f"{case.name}: parts must be scalar tensors without a gradient, but {', '.join(odd)} is not; return "
        "part.detach().",
    )


def check_inputs(case: LossCase) -> None:
    """Check that outputs and labels stay unchanged: other terms of a sum read them too."""
    outputs, batch = case.outputs(), case.batch()
    given = tree_map(outputs, lambda output: output.detach().clone().requires_grad_(output.requires_grad))
    labels = tree_map(batch, Tensor.clone)
    case.run(tree_map(given, lambda output: output * 1), labels)
    scores = collect_tensors(given)
    require(
        all(
            map(torch.equal, [*scores, *collect_tensors(labels)], [*collect_tensors(outputs), *collect_tensors(batch)])
        ),
        f"{case.name}: a loss must not change its inputs, but they changed; use no operations in place on them.",
    )


def check_large_scores(case: LossCase) -> None:
    """Check values and gradients of outputs that are very sure, right or wrong."""
    outputs = tree_map(case.outputs(), lambda output: (1000 * output.detach()).requires_grad_(output.requires_grad))
    value, _ = case.run(outputs, case.batch())
    require(
        all(bool(part.isfinite().all()) for part in (value, *collect_gradients(value, outputs))),
        f"{case.name}: value and gradients must be finite for scores of 1000, but they are not; use log_softmax or "
        "logsigmoid instead of the logarithm of a probability.",
    )


def check_half_precision(case: LossCase) -> None:
    """Check that the value of bfloat16 outputs is computed in float32."""
    outputs, batch = case.outputs(dtype=torch.bfloat16), case.batch()
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = case.run(outputs, batch)
    require(
        value.dtype == torch.float32 and bool(value.isfinite()),
        f"{case.name}: the mean of bfloat16 outputs must be finite and float32, but it is {value.item():g} in "
        f"{value.dtype}; convert scores by .float() before sums and exponentials.",
    )


def check_ignored_pixels(case: LossCase) -> None:
    """Check that ignored pixels have no gradient; those next to labelled ones may, since maps are interpolated."""
    if not case.has_labels:
        return
    outputs = case.outputs()
    value, _ = case.run(outputs, case.batch())
    maps = [gradient for gradient in collect_gradients(value, outputs) if gradient.shape[-2:] == SIZE]
    require(
        not any(bool(gradient[..., SIZE[1] // 2 + 1 :].any()) for gradient in maps),
        f"{case.name}: ignored pixels must get no gradient, but they do; multiply their costs by zero, or select the "
        "pixels with mask != ignore_index.",
    )
    require(
        any(bool(gradient[..., : SIZE[1] // 2].any()) for gradient in maps),
        f"{case.name}: labelled pixels must get a gradient, but none does; check that `ignore_index` of the loss is "
        f"{case.ignore_index}, as in the masks.",
    )


def check_unlabelled_batch(case: LossCase) -> None:
    """Check that a batch without labels gives zero."""
    if not case.has_labels:
        return
    outputs, batch = case.outputs(), case.batch()
    batch.mask.fill_(case.ignore_index)
    value, _ = case.run(outputs, batch)
    require(
        value.item() == 0 and all(bool((gradient == 0).all()) for gradient in collect_gradients(value, outputs)),
        f"{case.name}: a batch of ignored pixels must give a loss and gradients of 0, but the loss is {value.item()} "
        "or a gradient differs; divide by weight.clamp(min=1e-6) instead of a sum of zero.",
    )


def check_order(case: LossCase) -> None:
    """Check that the order of the images changes nothing."""
    if case.is_random:
        return
    order = torch.tensor([2, 0, 3, 1])
    outputs, batch = case.outputs(), case.batch()
    value, _ = case.run(outputs, batch)
    other, _ = case.run(tree_map(outputs, lambda output: output[order]), tree_map(batch, lambda part: part[order]))
    require(
        are_close([other], [value]),
        f"{case.name}: the order of the images must not change the loss, but it is {value.item():g} and in another "
        f"order {other.item():g}; treat all images alike.",
    )


def check_sum_over_batches(case: LossCase) -> None:
    """Check that the batches of a step, on all ranks, add up to the loss of one batch, as the training adds them."""
    loss = case.loss
    if loss.sums_over_batch or case.is_random:
        return
    outputs, batch = case.outputs(), case.batch()
    batches = batch.split(2)
    divisors = None
    if loss.num_divisors > 1:
        divisors = torch.stack([loss.divisors(part) for part in batches]).sum(0)
    half = IMAGES // 2
    predictions = [case.prediction(outputs).of_images(slice(start, start + half)) for start in (0, half)]
    terms = [batch_loss(loss, *both, divisors, 2) for both in zip(predictions, batches, strict=True)]
    total = torch.stack([term.total for term in terms]).sum() / torch.stack([term.weight for term in terms]).sum()
    value, _ = case.run(outputs, batch)
    require(
        are_close([total], [value]),
        f"{case.name}: two batches must add up to the loss of one with all their images, but they give "
        f"{total.item():g} and it is {value.item():g}; return the divisor of the mean as parts['weight'], or set "
        "sums_over_batch = True.",
    )


def check_divisors(case: LossCase) -> None:
    """Check that `divisors` is the divisor of the mean where terms share it."""
    loss, batch = case.loss, case.batch()
    if loss.divisor is None or loss.num_divisors > 1 or not case.has_labels:
        return
    _, parts = case.run(case.outputs(), batch)
    weight, divisors = parts.get("weight", torch.tensor(float(IMAGES))), loss.divisors(batch)
    require(
        divisors.shape == (1,) and are_close([divisors.float()], [weight.float()[None]]),
        f"{case.name}: with `divisor` set, divisors(batch) must return parts['weight'] as a tensor (1,), but it is "
        f"{divisors.tolist()} and the weight {weight.item():g}; compute both by one function.",
    )


def check_derivative(case: LossCase) -> None:
    """Check the gradient against finite differences in float64."""
    loss = case.loss.double()
    size = (3, 4)
    outputs, batch = case.outputs(2, size, torch.float64), case.batch(2, size)
    trained = [leaf for leaf in collect_tensors(outputs) if leaf.requires_grad]

    def value(*leaves: Tensor) -> Tensor:
        rest = iter(leaves)
        return case.run(tree_map(outputs, lambda output: next(rest) if output.requires_grad else output), batch)[0]

    dtype = value(*trained).dtype
    require(
        dtype == torch.float64,
        f"{case.name}: the mean of float64 outputs must be float64, but it is {dtype}; convert only half-precision "
        "scores, by dinoseg.utils.precision.at_least_float32.",
    )
    require(
        torch.autograd.gradcheck(value, trained, fast_mode=True, raise_exception=False),
        f"{case.name}: gradients must agree with finite differences in float64, but they do not; detach nothing, "
        "convert no scores to float32 (use dinoseg.utils.precision.at_least_float32), or correct the backward pass.",
    )
    loss.float()


LOSS_RULES = (
    check_needed_outputs,
    check_buffers,
    check_result,
    check_inputs,
    check_large_scores,
    check_half_precision,
    check_ignored_pixels,
    check_unlabelled_batch,
    check_order,
    check_sum_over_batches,
    check_divisors,
    check_derivative,
)
