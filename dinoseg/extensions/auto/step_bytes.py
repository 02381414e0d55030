"""Estimates of the memory and the operations of a training step, counted on fake tensors without computing."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.core.shapes import Prediction, tree_map
from dinoseg.extensions.auto.fake_tensors import fake_tensor_mode
from dinoseg.extensions.auto.parts import TrainingParts
from dinoseg.extensions.auto.random_batch import random_batch
from dinoseg.inference.memory import PeakBytes
from dinoseg.losses.full_resolution import LAUNCHED
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.frozen_casts import cache_casts
from dinoseg.training.optim import tensors_of

_BITS = {4: 0.516, 8: 1.002}  # bytes per quantised weight, including the scales of its blocks or rows
_HALF = 2  # bytes of a bfloat16 value
_TILE = 4 * 4 * LAUNCHED  # bytes of the loss's tiles on an accelerator: four float32 tiles at a time


@dataclass(frozen=True)
class StepBytes:
    """Bytes of the tensors of a training step on one device.

    Attributes:
        weights: of the whole model.
        gradients: of the trained parameters.
        optimizer: its state.
        average: moving average of the trained parameters.
        ranks: copies of the gradients for communication between ranks.
        activations: images, and tensors that the forward pass saves for the backward pass.
        loss: peak of the loss, in addition to the above.
        peak: maximum of all at a time.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    ranks: int
    activations: int
    loss: int
    peak: int


class LossBytes:
    """Memory of a recipe's loss in addition to the model's outputs, extrapolated from real losses of a few samples.

    `learns` holds the indices of the output tensors that receive a gradient.

    Args:
        parts: of the training; the classes and the crop matter.
        bf16: whether the model computes in bfloat16.
        accelerator: whether to estimate for an accelerator, whose tiles are larger.
    """

    def __init__(self, parts: TrainingParts, *, bf16: bool, accelerator: bool) -> None:
        self.accelerator = accelerator
        least = parts.outline().head.min_batch_size
        few, _ = _real_loss(parts, least, bf16, accelerator)
        more, self.learns = _real_loss(parts, least + 1, bf16, accelerator)
        self._each = more - few
        self._fixed = few - least * self._each
        if accelerator and parts.has_masks:
            self._fixed += min(_TILE, 4 * 4 * parts.num_classes * math.prod(parts.crop))

    def of(self, samples: int) -> int:
        """Return the bytes for `samples` samples."""
        return max(0, self._fixed + samples * self._each)


def step_bytes(
    parts: TrainingParts, loss: LossBytes, *, samples: int, accumulate: int, bf16: bool, world_size: int = 1
) -> StepBytes:
    """Return the memory of a step on one of `world_size` devices, with `samples` per batch and `accumulate` batches.

    Temporary memory of single operations and libraries is not counted, nor is validation.

    Raises:
        UserError: the parts do not fit together.
    """
    model, saved = outline(parts)
    with fake_tensor_mode() as peak, cuda_operations() if loss.accelerator else nullcontext():
        model.to_empty(device="cpu")
        weights = peak.now - saved
        if bf16:
            cache_casts(model)  # as in `Engine.prepare`
        state = _optimizer_bytes(parts.optimizer(model))
        average = sum(value.nbytes for _, value in tensors_of(model, trained_names(model))) if parts.has_ema else 0
        activations = most = 0
        for _ in range(min(2, accumulate)):  # the second pass runs with the gradients of the first in memory
            before = peak.now
            ends = ends_of(predict(model, parts, samples, bf16))
            activations = peak.now - before
            most = max(most, peak.now + loss.of(samples))
            DummyLoss.apply(*(ends[index] for index in loss.learns)).backward()
            del ends
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    ranks = gradients if world_size > 1 else 0
    constant = state + average + ranks - saved
    most = max(most, peak.most) + constant
    return StepBytes(weights, gradients, state, average, ranks, activations, loss.of(samples), most)


def step_flops(parts: TrainingParts, samples: int, *, bf16: bool) -> int:
    """Return the FLOPs of a forward and a backward pass over `samples` samples; a multiply-add counts as two.

    Matrix products, convolutions and attention are counted, but not the loss. Operations that checkpointing repeats
    are counted again.

    Raises:
        UserError: the parts do not fit together.
    """
    learns = LossBytes(parts, bf16=bf16, accelerator=False).learns
    model, _ = outline(parts)
    with fake_tensor_mode(), FlopCounterMode(display=False) as counter:
        ends = ends_of(predict(model.to_empty(device="cpu"), parts, samples, bf16))
        DummyLoss.apply(*(ends[index] for index in learns)).backward()
    return counter.get_total_flops()


def outline(parts: TrainingParts) -> tuple[SegmentationModel, int]:
    """Return the model on the meta device in train mode, and the bytes that quantisation saves.

    Quantised weights appear as bfloat16, in which they are multiplied; subtract the second value from their size.
    """
    model, saved = parts.outline(), 0.0
    if parts.bits is not None:
        for block in model.backbone.blocks:
            for name, part in block.named_modules():
                if isinstance(part, nn.Linear) and "lora_" not in name:
                    part.weight.data = part.weight.data.to(torch.bfloat16)
                    saved += part.weight.numel() * (_HALF - _BITS[parts.bits])
    return model.train(), math.floor(saved)


def predict(model: SegmentationModel, parts: TrainingParts, samples: int, bf16: bool) -> Prediction:
    """Return a model's prediction for `samples` training samples; within `fake_tensor_mode` its tensors are fake."""
    images = torch.empty(samples, *parts.shape, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16 or parts.bits is not None):
        return model(images)


def ends_of(prediction: Prediction) -> list[Tensor]:
    """Return the distinct tensors of a prediction, some of which connect the loss to the model."""
    ends: dict[int, Tensor] = {}
    tree_map([prediction.outputs, prediction.grid, prediction.masks], lambda end: ends.setdefault(id(end), end))
    return list(ends.values())


class DummyLoss(torch.autograd.Function):
    """Dummy loss that saves nothing and returns gradients of the sizes of its inputs."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        """Return a scalar."""
        ctx.kinds = [(output.shape, output.dtype) for output in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Return uninitialised gradients."""
        return tuple(upstream.new_empty(shape, dtype=dtype) for shape, dtype in ctx.kinds)


@contextmanager
def cuda_operations() -> Iterator[None]:
    """Let operations on a CPU save what those on CUDA save for the backward pass.

    Two differ in memory. Dropout saves a mask of booleans on CUDA, but one in the input's dtype on a CPU: four times
    the bytes on the float32 inputs of LoRA updates. Autocast computes norms in float32 on CUDA only. Functions are
    replaced, since a mode of torch is off when checkpointing repeats them in a backward pass.
    """
    own = {name: getattr(F, name) for name in ("dropout", "layer_norm", "group_norm")}

    def dropout_of_cuda(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and 0 < p < 1 and not inplace:
            return torch.native_dropout(input, p, train=True)[0]
        return own["dropout"](input, p, training, inplace)

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def norm_of_cuda(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return norm(input.float() if torch.is_autocast_enabled("cpu") else input, *args, **kwargs)

        return norm_of_cuda

    ours = {"dropout": dropout_of_cuda, **{name: in_float32(own[name]) for name in ("layer_norm", "group_norm")}}
    try:
        for name, function in ours.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


def _optimizer_bytes(optimizer: Optimizer) -> int:
    """Return the size of an optimizer's state, extrapolated from a real step on a small parameter."""
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    side = 64
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        few = nn.Parameter(torch.zeros(side, side))
        few.grad = torch.zeros_like(few)
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": [few]}]
        optimizer.step()
        state_bytes = sum(
            value.nbytes for value in optimizer.state[few].values() if isinstance(value, Tensor) and value.ndim
        )
    return trained * state_bytes // side**2


def _real_loss(parts: TrainingParts, samples: int, bf16: bool, accelerator: bool) -> tuple[int, list[int]]:
    """Run a real loss on `samples` samples; return its peak memory and the indices of outputs with a gradient.

    The memory counts in addition to the model's outputs.
    """
    model, _ = outline(parts)
    with fake_tensor_mode(), cuda_operations() if accelerator else nullcontext():
        model.to_empty(device="cpu")
        prediction = predict(model, parts, samples, bf16)
    batch = random_batch(parts, samples)
    loss = parts.loss()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors made in other threads are not counted
    try:
        with PeakBytes() as peak:
            drawn: dict[int, Tensor] = {}

            def real(tensor: Tensor) -> Tensor:
                if id(tensor) not in drawn:
                    value = torch.rand(tensor.shape).to(tensor.dtype)
                    drawn[id(tensor)] = value.requires_grad_(tensor.requires_grad)
                return drawn[id(tensor)]

            outputs, grid, masks = tree_map([prediction.outputs, prediction.grid, prediction.masks], real)
            peak.most = before = peak.now
            made = dataclasses.replace(prediction, outputs=outputs, grid=grid, masks=masks)
            loss(made, batch)[0].backward()
            return peak.most - before, [index for index, end in enumerate(ends_of(made)) if end.grad is not None]
    finally:
        torch.set_num_threads(threads)
