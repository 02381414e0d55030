"""Estimate of the memory of a training step, counted on fake tensors, without computing anything."""

import ctypes
import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dinoseg.autotune.random_batch import random_batch
from dinoseg.core.shapes import Prediction, tree_map
from dinoseg.inference.memory import PeakBytes
from dinoseg.inference.walk import walking
from dinoseg.losses.full_resolution import LAUNCHED
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.frozen_casts import cache_casts
from dinoseg.training.optim import tensors_of
from dinoseg.training.parts import TrainingParts

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
        heap: heap that the C library takes for these on a CPU, fragmentation included; 0: unknown, or not a CPU.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    ranks: int
    activations: int
    loss: int
    peak: int
    heap: int = 0


class LossBytes:
    """Memory of a recipe's loss in addition to the model's outputs, extrapolated from real losses of a few samples.

    `learns` holds the indices of the output tensors that receive a gradient. `draws` states whether the loss or the
    model samples at random.

    Args:
        parts: of the training; the classes and the crop matter.
        bf16: whether the model computes in bfloat16.
        accelerator: whether to estimate for an accelerator, whose tiles are larger.
    """

    def __init__(self, parts: TrainingParts, *, bf16: bool, accelerator: bool) -> None:
        self.accelerator = accelerator
        least = parts.min_batch_size()
        draws = _Draws()
        (few, _), (more, self.learns) = (_real_loss(parts, samples, bf16, draws) for samples in (least, least + 1))
        self.draws = draws.seen
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
    with walking(PeakBytes() if loss.accelerator else HeapBytes()) as peak:
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
            activations, most = peak.now - before, max(most, peak.now + loss.of(samples))
            DummyLoss.apply(*(ends[index] for index in loss.learns)).backward()
            del ends
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    ranks = gradients if world_size > 1 else 0
    constant = state + average + ranks - saved
    taken = loss.of(samples)
    grown = peak.grown if isinstance(peak, HeapBytes) else 0
    heap = grown + taken + constant if grown else 0
    return StepBytes(
        weights, gradients, state, average, ranks, activations, taken, max(most, peak.most) + constant, heap
    )


class _Draws(TorchDispatchMode):
    """Dispatch mode that records in `seen` whether an operation is random; attention without dropout does not count."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            known = func._schema.arguments
            given = dict(zip((argument.name for argument in known), args, strict=False)) | (kwargs or {})
            default = next((argument.default_value for argument in known if argument.name == "dropout_p"), 1.0)
            self.seen |= given.get("dropout_p", default) > 0
        return func(*args, **(kwargs or {}))


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
    """Return a model's prediction for `samples` training samples; within `walking` its tensors are fake."""
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


def _real_loss(parts: TrainingParts, samples: int, bf16: bool, draws: _Draws) -> tuple[int, list[int]]:
    """Run a real loss on `samples` samples; return its peak memory and the indices of outputs with a gradient.

    The memory counts in addition to the model's outputs.
    """
    model, _ = outline(parts)
    with walking():
        model.to_empty(device="cpu")
        with draws:
            prediction = predict(model, parts, samples, bf16)
    batch, loss = random_batch(parts, samples), parts.loss()
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
            with draws:
                loss(made, batch)[0].backward()
            return peak.most - before, [index for index, end in enumerate(ends_of(made)) if end.grad is not None]
    finally:
        torch.set_num_threads(threads)


_ALIGNED = 64  # bytes; torch's alignment


class _Info(ctypes.Structure):
    """Result of glibc's mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _glibc() -> Any:
    """Return the C library; None if it cannot report its heap size (glibc before 2.33, or another library)."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _Info
    library.aligned_alloc.restype = ctypes.c_void_p
    library.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    return library


class HeapBytes(PeakBytes):
    """Counter of tensor bytes that also allocates each tensor on the heap, without writing to it.

    Memory freed between live tensors is hard to reuse: with recomputed blocks, the heap of a process may be twice as
    large as the tensors in it.

    Attributes:
        grown: maximum growth of the heap in bytes; 0: the C library does not report it (glibc does from 2.33 on), or
            ran out of memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grown = 0
        self._library = _glibc()
        self._tells = self._library is not None
        self._before = self._size() if self._tells else 0

    def _take(self, size: int) -> Any:
        address = None
        if self._tells:
            address = self._library.aligned_alloc(_ALIGNED, -(-max(size, 1) // _ALIGNED) * _ALIGNED)
            self.grown = max(self.grown, self._size() - self._before)
            if address is None:
                self._tells, self.grown = False, 0
        return super()._take(size), address

    def _free(self, taken: Any) -> None:
        size, address = taken
        super()._free(size)
        if address is not None:
            self._library.free(address)

    def _size(self) -> int:
        info = self._library.mallinfo2()
        return info.arena + info.hblkhd
