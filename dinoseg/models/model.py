"""The segmentation model: a backbone, a head and the preprocessing of images."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.geometry import resize, to_unit_range, valid_share
from dinoseg.core.shapes import FrozenFeatures, Prediction
from dinoseg.core.sizes import Size, backbone_size
from dinoseg.core.task import SEMANTIC, ObjectTask, Task, refuse_layers
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Scale, check_annotations

_SAMPLES = 1024  # values per tensor that enter the fingerprint


class SegmentationModel(nn.Module):
    """Map images (B, C, H, W), uint8, uint16 or float in 0..1, to a `Prediction` that returns class scores at any size.

    Heads for clips also take (B, T, C, H, W). Three channels are RGB.

    Args:
        backbone: adapted backbone; always in eval mode if fully frozen.
        head: maps feature maps to outputs, and outputs to pixel predictions.
        scale: backbone pixels per image pixel; 0.5 halves the resolution.
        longest: larger images are reduced to this length of the longer side in pixels, before `scale` is applied.
        task: meaning of the class scores.
        num_classes: number of classes that have a name, which the head must score; None: any number.
    """

    @check_annotations
    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        scale: Scale = 1.0,
        longest: Count | None = None,
        task: Task = SEMANTIC,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        head.check_backbone(backbone)
        if head.mixture:
            refuse_layers(task, f"a head of masks, {type(head).__name__},", "Choose head=linear or head=dpt.")
        if isinstance(task, ObjectTask) and not head.mixture:
            raise UserError(
                f"{type(head).__name__} predicts no masks, which a task of objects needs. Choose {task.advice}; or "
                "task=semantic."
            )
        if isinstance(task, ObjectTask) and not head.no_object:
            raise UserError(
                "no_object=false: each query of the head would predict an object in every image. Choose "
                "no_object=true, or task=semantic."
            )
        self.task = task
        self.num_classes = num_classes
        self.backbone = backbone
        self.head = head
        self.patch_size = backbone.patch_size
        self.scale = scale
        self.longest = longest
        self.limit: Callable[[Size], int | None] | None = None  # longest side per image size; overrides `longest`

    def forward(self, images: Tensor | FrozenFeatures, *, reduce: bool = True) -> Prediction:
        """Return the prediction for images of one size, or for the output of `frozen`.

        `reduce`: limit the resolution to `longest`; False for crops that already have the right resolution.

        Raises:
            UserError: the head scores another number of classes, such as after its class layer was replaced.
        """
        head = self.head
        if isinstance(images, FrozenFeatures):
            size, seen = images.size, images.seen
            outputs = head.forward_trainable(self.backbone, images.tensors, seen)
        else:
            pixels = self.pixels(images, reduce=reduce)
            size, seen = _size(images), _size(pixels)
            outputs = head.run(self.backbone, pixels)
        valid = valid_share(seen, self.patch_size)
        grid, masks = head.grid_scores(outputs), head.weighted_masks(outputs)
        if grid is not None:
            self._check_classes(grid.shape[1])
        if masks is not None:
            self._check_classes(masks.shares.shape[-1])
        return Prediction(outputs, size, valid, self._predict_pixels, head.mixture, grid, masks, self.task)

    def _predict_pixels(self, outputs: Any, size: Size, valid: tuple[float, float]) -> Tensor:
        scores = self.head.predict(outputs, size, valid)
        self._check_classes(scores.shape[1])
        return scores

    def _check_classes(self, found: int) -> None:
        """Refuse another number of classes than there are names: ids beyond them would mean nothing."""
        if self.num_classes not in (None, found):
            raise UserError(
                f"head: {type(self.head).__name__} scores {found} classes, and the model has {self.num_classes}. Give "
                f"its class layer {self.num_classes} outputs, or the model {found} classes."
            )

    @torch.no_grad()
    def frozen(self, images: Tensor) -> FrozenFeatures:
        """Return the frozen features of images (B, C, H, W).

        These are the activations at the deepest cut before any trained parameter.

        Raises:
            UserError: the first block is trained, or the model cannot be split at this cut.
        """
        if self.backbone.first_trained == 0:
            raise UserError(
                "This backbone has no frozen part before its first trained block. Choose the adapter frozen or "
                "last_blocks, or LoRA in the last blocks only (blocks=4); or cache no features."
            )
        pixels = self.pixels(images)
        return FrozenFeatures(self.head.forward_frozen(self.backbone, pixels), _size(images), _size(pixels))

    def train(self, mode: bool = True) -> "SegmentationModel":
        """Switch mode, but leave frozen modules in eval mode: their dropout is off, their running means are fixed."""
        super().train(mode)
        for part in self.modules():
            parameters = list(part.parameters())
            if part is not self and parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        return self

    def set_progress(self, step: int, steps: int) -> None:
        """Pass the 0-based step and the length of the training to heads whose behaviour depends on it."""
        self.head.set_progress(step, steps)

    def longest_of(self, size: Size) -> int | None:
        """Return the limit in pixels for the longer side of images of `size` (H, W), or None for no limit."""
        return self.longest if self.limit is None else self.limit(size)

    def reduced_size(self, size: Size) -> Size:
        """Return the (H, W) of images of `size` after the limit on the longer side and before `scale`."""
        return backbone_size(size, 1.0, self.longest_of(size))

    def input_size(self, size: Size) -> Size:
        """Return the (H, W) at which the backbone sees images of `size`."""
        return backbone_size(size, self.scale, self.longest_of(size))

    def pixels(self, images: Tensor, *, reduce: bool = True) -> Tensor:
        """Return images (..., C, H, W) as floats in 0..1 at the resolution of the backbone."""
        images = to_unit_range(images)
        image_size = _size(images)
        size = self.input_size(image_size) if reduce else backbone_size(image_size, self.scale, None)
        if size == tuple(images.shape[-2:]):
            return images
        return resize(images.flatten(0, -4), size).unflatten(0, images.shape[:-3])


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


def trained_names(model: SegmentationModel) -> set[str]:
    """Return the state-dict names that a checkpoint must contain because training changes them.

    These are trainable parameters, and the buffers of the head and of trained modules (running means). A randomly
    initialised backbone is included as a whole, since no file can restore it; so is a head whose frozen part comes
    from no file. Quantised weights are excluded, since the seed reproduces them.
    """
    state = model.state_dict().keys()
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = {name for name, trainable in parameters.items() if trainable}
    names |= {name for name in state if name.startswith("head.") and name not in parameters}
    for where, part in model.named_modules():
        if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            names |= {f"{where}.{name}" for name, _ in part.named_buffers(recurse=False)} & state
    for name, part in (("backbone", model.backbone), ("head", model.head)):
        if part.weights in (None, "random"):
            names |= {key for key in state if key.startswith(f"{name}.")}
    return names - quantised_names(model)


def frozen_tensors(model: SegmentationModel) -> Iterator[tuple[str, Tensor]]:
    """Yield names, parameters and buffers of the modules without a trainable parameter of their own.

    Quantised layers also yield their scales, which are neither parameters nor buffers.
    """
    for where, part in model.named_modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        if _is_quantised(part):
            rounding = getattr(part, "compute_dtype", None)  # 4-bit layers cast the bias at their first forward
            tensors = [
                (name, value.to(rounding) if name == "bias" else value) for name, value in part.state_dict().items()
            ]
        if not any(tensor.requires_grad for _, tensor in tensors):
            yield from ((f"{where}.{name}", tensor) for name, tensor in tensors)


def non_persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the non-persistent buffers: colour statistics, and rotation frequencies that a weights file may set."""
    state = model.state_dict().keys() | quantised_names(model)
    return {name: buffer for name, buffer in model.named_buffers() if name not in state}


def stateless_modules(model: nn.Module) -> dict[str, str]:
    """Return the classes of the modules without parameters, buffers and children, such as activations, by name."""
    modules = dict(model.named_modules())
    stateful = {
        name.rpartition(".")[0] for named in (model.named_parameters(), model.named_buffers()) for name, _ in named
    }
    return {
        name: type(part).__name__ for name, part in modules.items() if name not in stateful and not any(part.children())
    }


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of the names, shapes and sampled values of tensors, in the given order."""
    digest = hashlib.sha256()
    for name, value in tensors:
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def quantised_names(model: nn.Module) -> set[str]:
    """Return the state-dict names of quantised layers: weights, scales, and biases (which change dtype)."""
    names = set()
    for where, part in model.named_modules():
        if _is_quantised(part):
            names |= {f"{where}.{name}" for name in part.state_dict()}
    return names


def _is_quantised(part: nn.Module) -> bool:
    return type(part).__module__.startswith("bitsandbytes.")
