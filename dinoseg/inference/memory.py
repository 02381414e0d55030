"""Estimated memory of inference passes, free memory, and out-of-memory errors."""

import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinoseg.inference.rows import Rows
from dinoseg.inference.strategy import Autocast
from dinoseg.models.model import SegmentationModel, Size, backbone_size
from dinoseg.utils.cores import PROC, group_folders, read_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import in_bytes

_NOISE = 0.02  # relative difference in bytes per pixel between two sizes that counts as none
_FRAME_BYTES = 4  # per pixel: RGB and class ID
# (limit, usage, reclaimable file cache) of cgroup v2 and v1
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# parts of RuntimeError messages with which libraries report failed allocations
_SHORT = (
    *("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED"),
    "Storage size calculation overflowed",  # of a tensor larger than any memory
)


class OutOfMemory(UserError):
    """Error raised when images need more memory than is available."""


def is_shortage(error: Exception) -> bool:
    """Return whether an error reports a failed allocation."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _SHORT)


def reason_of(shortage: Exception) -> str:
    """Return the line of an out-of-memory error that states the reason."""
    lines = str(shortage).splitlines() or ["none left"]
    return next((line for line in lines if any(words in line for words in _SHORT)), lines[0]).strip()


def as_out_of_memory(error: Exception) -> OutOfMemory | None:
    """Return the `OutOfMemory` error to raise for a failed allocation; None for other errors."""
    if not is_shortage(error):
        return None
    return OutOfMemory(
        f"Out of memory ({reason_of(error)}). Free some memory. A training needs less with a smaller backbone, head or "
        "batch: mode=plan lists settings that fit."
    )


@contextmanager
def telling_shortage(rows: Rows) -> Iterator[None]:
    """Convert allocation errors of libraries to `OutOfMemory`; other errors propagate unchanged.

    Raises:
        OutOfMemory: an allocation failed; the message states number and size of the images.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory(
            f"Not enough memory to predict {describe_images(rows)} ({reason_of(error)}). Free some; or set "
            "inference=windows, with a smaller inference.size or inference.batch_size=1; or predict fewer images at "
            "once; or set resolution.longest=N to reduce the images."
        ) from None


def describe_images(rows: Rows) -> str:
    """Return number and size of the images in words."""
    images = f"{rows.count} images" if rows.count > 1 else "an image"
    return f"{images} of {rows.size[1]} x {rows.size[0]} (width x height)"


class PeakBytes(TorchDispatchMode):
    """Dispatch mode that tracks the bytes of tensors created by operations: current (`now`) and peak (`most`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            # views share a storage, which counts once
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                size = storage.nbytes()
                self._known[storage] = size
                self.now += size
                self.most = max(self.most, self.now)
                # freed when the storage is, not the tensor: autograd or a view may still hold it
                weakref.finalize(storage, self._free, size)
        return made

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class PassCost:
    """Memory of a pass over one image, without weights, per pixel of the backbone's input and of the prediction.

    Attributes:
        forward: peak bytes per input pixel during the forward pass.
        squared: bytes per input pixel squared, for attention that materialises its matrix.
        retained: bytes per input pixel of the head's outputs.
        scores: peak bytes per predicted pixel while the outputs become class IDs.
    """

    forward: float
    squared: float
    retained: float
    scores: float

    def of(self, images: int, input_size: Size, size: Size) -> float:
        """Return the bytes for images with backbone inputs of `input_size` (h, w) and predictions of `size` (H, W)."""
        pixels = math.prod(input_size)
        forward = self.forward * pixels + self.squared * pixels**2
        return images * max(forward, self.retained * pixels + self.scores * math.prod(size))


def measure(model: SegmentationModel, side: int, autocast: Autocast) -> PassCost:
    """Measure the memory of passes over two small black squares, whose sides differ by a factor of 2.

    Workspace that an operation allocates internally is not measured.

    Args:
        model: a segmenter in eval mode.
        side: approximate side of the larger square, in image pixels.
        autocast: context manager factory of the precision.
    """
    patch = model.patch_size / model.scale
    cells = max(1, round(side / patch / 2))
    small, large = (_measure_pass(model, round(number * patch), autocast) for number in (cells, 2 * cells))
    # bytes per pixel are the same for both squares unless attention stores its matrix, whose bytes per pixel grow by
    # the number of pixels; two squares give both coefficients
    growth = (large.forward - small.forward) / large.forward
    squared = (large.forward - small.forward) / (large.pixels - small.pixels) if growth > _NOISE else 0.0
    forward = large.forward - squared * large.pixels
    return PassCost(forward, squared, large.retained, large.scores)


class _Taken(NamedTuple):
    """Bytes per pixel, measured on one square."""

    pixels: int
    forward: float
    retained: float
    scores: float


@torch.no_grad()
def _measure_pass(model: SegmentationModel, side: int, autocast: Autocast) -> _Taken:
    device = next(model.parameters(), torch.empty(0)).device
    images = torch.zeros(1, model.backbone.channels, side, side, dtype=torch.uint8, device=device)
    with PeakBytes() as peak:
        with autocast():
            prediction = model(images, reduce=False)
        forward, retained = peak.most, peak.now
        # class IDs come after the pass, whose own activations are freed by then
        peak.most = retained
        prediction.class_ids()
    input_size = math.prod(backbone_size((side, side), model.scale, None))
    return _Taken(input_size, forward / input_size, retained / input_size, (peak.most - retained) / side**2)


def check_frames(path: Path, size: Size, count: int) -> None:
    """Check that `count` frames (H, W) of a video, with their class IDs, fit into free memory.

    Raises:
        UserError: they do not fit; the message states their size and remedies.
    """
    needed, free = _FRAME_BYTES * count * math.prod(size), free_bytes(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"{path} has frames of {size[1]} x {size[0]} pixels; up to {count} of them at a time need "
            f"{in_bytes(needed)}, and {in_bytes(free)} are free. Lower mode.batch_size, or downscale it "
            "(ffmpeg -i IN -vf scale=1920:-2 OUT.mp4)."
        )


def free_bytes(device: torch.device) -> float:
    """Return the free bytes of a device; for a CPU, what this process may allocate, cgroup limits included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds and does not use is free for this process alone
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    # containers and `ulimit -v` limit a process below what the machine has
    return min(
        float(psutil.virtual_memory().available), _addresses(), *(limit - used for limit, used in _group_limits())
    )


def _addresses() -> float:
    """Return the bytes left below the address-space limit (`ulimit -v`); infinity without a limit."""
    if sys.platform == "win32":
        return math.inf
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = read_text(PROC / "self/statm").split()
    return limit - int(pages[0]) * resource.getpagesize() if limit != resource.RLIM_INFINITY and pages else math.inf


def _group_limits() -> list[tuple[float, float]]:
    """Return (limit, usage) of each cgroup of this process that has a limit."""
    return [limit for folder in group_folders("memory") for limit in _limit(folder)]


def _limit(folder: Path) -> list[tuple[float, float]]:
    for limit, usage, dropped in _FILES:
        texts = read_text(folder / limit).strip(), read_text(folder / usage).strip()
        if all(text.isdecimal() for text in texts):  # a cgroup without a limit states "max"
            stat = dict(line.split() for line in read_text(folder / "memory.stat").splitlines())
            return [(float(texts[0]), float(texts[1]) - float(stat.get(dropped, 0)))]
    return []
