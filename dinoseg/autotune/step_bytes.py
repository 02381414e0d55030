"""What a training step takes of memory: its tensors are counted on a walk through the model that computes nothing."""

import ctypes
import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dinoseg.autotune.stand_in import drawn_batch, image_shape
from dinoseg.core.shapes import Prediction, mapped
from dinoseg.experiment import build, criteria
from dinoseg.inference.memory import PeakBytes
from dinoseg.inference.walk import walking
from dinoseg.losses.full_resolution import LAUNCHED
from dinoseg.models.model import Segmenter, trained_names
from dinoseg.tasks.least_batch import least_batch
from dinoseg.training.frozen_casts import keep_casts
from dinoseg.training.optim import tensors_of

_BITS = {4: 0.516, 8: 1.002}  # bytes of a quantised weight, with the scales of its blocks or rows
_HALF = 2  # bytes of a bfloat16 number
_TILE = 4 * 4 * LAUNCHED  # bytes of the loss's tiles on an accelerator: four of float32 at a time


@dataclass(frozen=True)
class StepBytes:
    """Bytes of the tensors of a training step on one device.

    Attributes:
        weights: of the whole model.
        gradients: of what is trained.
        optimizer: what it keeps.
        average: moving average of what is trained.
        ranks: copies of the gradients that ranks send one another.
        activations: images, and what the forward pass keeps for the backward pass.
        loss: what it takes at most beside these.
        peak: the most of all at a time.
        heap: what the C library of a CPU takes for these, holes included; 0: it does not tell, or it is no CPU.
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
    """What the loss of a config takes beside a model's outputs, told from real losses of a few samples.

    `learns` are the places of the outputs from which it learns, `draws` says whether it or the model draws at random.

    Args:
        cfg: the whole config; its classes and crop count.
        bf16: whether the model computes in bfloat16.
        accelerator: whether it is for one, whose tiles are larger.
    """

    def __init__(self, cfg: DictConfig, *, bf16: bool, accelerator: bool) -> None:
        self.accelerator = accelerator
        least = least_batch(cfg)
        draws = _Draws()
        (few, _), (more, self.learns) = (_real_loss(cfg, samples, bf16, draws) for samples in (least, least + 1))
        self.draws = draws.seen
        self._each = more - few
        self._fixed = few - least * self._each
        height, width = image_shape(cfg)[-2:]
        if accelerator and cfg.trainer.feed == "images":
            self._fixed += min(_TILE, 4 * 4 * len(cfg.data.classes) * height * width)

    def of(self, samples: int) -> int:
        """Return the bytes for so many samples."""
        return max(0, self._fixed + samples * self._each)


def step_bytes(
    cfg: DictConfig, loss: LossBytes, *, samples: int, accumulate: int, bf16: bool, world: int = 1
) -> StepBytes:
    """Return what a step takes on one of `world` devices that takes `samples` at once, `accumulate` times.

    Left out are what single operations and the libraries take for themselves, and all of validation.

    Raises:
        UserError: the parts of the config do not go together.
    """
    model, saved = outline(cfg)
    with walking(PeakBytes() if loss.accelerator else HeapBytes()) as peak:
        model.to_empty(device="cpu")
        weights = peak.now - saved
        if bf16:
            keep_casts(model)  # as `Engine.prepare` does
        state = _optimizer_bytes(cfg, model)
        average = sum(value.nbytes for _, value in tensors_of(model, trained_names(model))) if cfg.trainer.ema else 0
        activations = most = 0
        for _ in range(min(2, accumulate)):  # the second time beside the gradients of the first
            before = peak.now
            ends = ends_of(predict(model, cfg, samples, bf16))
            activations, most = peak.now - before, max(most, peak.now + loss.of(samples))
            Learnt.apply(*(ends[place] for place in loss.learns)).backward()
            del ends
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    ranks = gradients if world > 1 else 0
    constant = state + average + ranks - saved
    taken = loss.of(samples)
    grown = peak.grown if isinstance(peak, HeapBytes) else 0
    heap = grown + taken + constant if grown else 0
    return StepBytes(
        weights, gradients, state, average, ranks, activations, taken, max(most, peak.most) + constant, heap
    )


class _Draws(TorchDispatchMode):
    """Notes in `seen` whether an operation draws at random; attention that drops nothing out is none."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            known = func._schema.arguments
            given = dict(zip((argument.name for argument in known), args, strict=False)) | (kwargs or {})
            default = next((argument.default_value for argument in known if argument.name == "dropout_p"), 1.0)
            self.seen |= given.get("dropout_p", default) > 0
        return func(*args, **(kwargs or {}))


def outline(cfg: DictConfig) -> tuple[Segmenter, int]:
    """Return a config's model, ready to train, and how many bytes less it is than its tensors, for quantised weights.

    These stand as bfloat16, in which they are multiplied.
    """
    bits = cfg.adapter.get("bits")
    if bits in _BITS:
        cfg = OmegaConf.merge(cfg, {"adapter": {"bits": None}})  # type: ignore[assignment]
    model = build.outline(cfg)
    saved = 0.0
    if bits in _BITS:
        for block in model.backbone.blocks:
            for name, part in block.named_modules():
                if isinstance(part, nn.Linear) and "lora_" not in name:
                    part.weight.data = part.weight.data.to(torch.bfloat16)
                    saved += part.weight.numel() * (_HALF - _BITS[bits])
    # by where weights come from it is known what training changes
    model.backbone.weights = cfg.backbone.get("weights", model.backbone.weights)
    model.head.weights = cfg.head.get("weights", model.head.weights)
    return model.train(), math.floor(saved)


def predict(model: Segmenter, cfg: DictConfig, samples: int, bf16: bool) -> Prediction:
    """Return what a model makes of so many training samples; within `walking`, without numbers."""
    images = torch.empty(samples, *image_shape(cfg), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16 or cfg.adapter.get("bits") in _BITS):
        return model(images)


def ends_of(prediction: Prediction) -> list[Tensor]:
    """Return the tensors of a prediction, through some of which a loss reaches the model."""
    ends: dict[int, Tensor] = {}
    mapped([prediction.outputs, prediction.grid, prediction.masks], lambda end: ends.setdefault(id(end), end))
    return list(ends.values())


class Learnt(torch.autograd.Function):
    """A loss that keeps nothing, and gives gradients of its inputs' own size."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        """Return a scalar."""
        ctx.kinds = [(output.shape, output.dtype) for output in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Return gradients, which no numbers are written to."""
        return tuple(upstream.new_empty(shape, dtype=dtype) for shape, dtype in ctx.kinds)


def _optimizer_bytes(cfg: DictConfig, model: Segmenter) -> int:
    """Return what an optimizer keeps of a model's weights, by what one of its kind keeps of a few real numbers."""
    optimizer: Optimizer = build.optimizer(cfg, model)
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    side = 64
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        few = nn.Parameter(torch.zeros(side, side))
        few.grad = torch.zeros_like(few)
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": [few]}]
        optimizer.step()
        kept = sum(value.nbytes for value in optimizer.state[few].values() if isinstance(value, Tensor) and value.ndim)
    return trained * kept // side**2


def _real_loss(cfg: DictConfig, samples: int, bf16: bool, draws: _Draws) -> tuple[int, list[int]]:
    """Return what a real loss takes at most beside a model's outputs for so many samples, and from which it learns."""
    model, _ = outline(cfg)
    with walking():
        model.to_empty(device="cpu")
        with draws:
            prediction = predict(model, cfg, samples, bf16)
    batch = drawn_batch(cfg, samples)
    loss = criteria.unweighted(cfg)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is made in other threads is not counted
    try:
        with PeakBytes() as peak:
            drawn: dict[int, Tensor] = {}

            def real(tensor: Tensor) -> Tensor:
                if id(tensor) not in drawn:
                    value = torch.rand(tensor.shape).to(tensor.dtype)
                    drawn[id(tensor)] = value.requires_grad_(tensor.requires_grad)
                return drawn[id(tensor)]

            outputs, grid, masks = mapped([prediction.outputs, prediction.grid, prediction.masks], real)
            peak.most = before = peak.now
            made = dataclasses.replace(prediction, outputs=outputs, grid=grid, masks=masks)
            with draws:
                loss(made, batch)[0].backward()
            return peak.most - before, [place for place, end in enumerate(ends_of(made)) if end.grad is not None]
    finally:
        torch.set_num_threads(threads)


_ALIGNED = 64  # bytes: as torch asks for it


class _Info(ctypes.Structure):
    """What glibc's mallinfo2 tells."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _glibc() -> Any:
    """Return the C library; None: another one, or an older one, which does not tell how large its heap is."""
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
    """Counts bytes of tensors, and takes memory for each as it would be taken, which nothing is written to.

    What is freed among what stays is of little use to later tensors: where blocks are computed again the heap of a
    process may be twice as large as the tensors in it.

    Attributes:
        grown: bytes that the heap has grown by at most; 0: the C library does not tell (glibc does, from 2.33 on), or
            gave no more.
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
        told = self._library.mallinfo2()
        return told.arena + told.hblkhd
