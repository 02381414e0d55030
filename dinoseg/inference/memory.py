"""How much memory a pass over an image takes, told from small ones, and how much is free."""

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

from dinoseg.inference.policy import Autocast
from dinoseg.inference.rows import Rows
from dinoseg.models.model import Segmenter, Size, backbone_size
from dinoseg.utils.control_groups import PROC, group_folders, read_text
from dinoseg.utils.errors import UserError

_NOISE = 0.02  # share by which bytes a pixel may differ with the size, where they do not grow with it
_FRAME_BYTES = 4  # of a pixel: colours and class id
# (limit, usage, what of it is files that can be dropped) of both versions of control groups
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


# what libraries say, as a RuntimeError, where memory cannot be had
_SHORT = (
    *("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED"),
    "Storage size calculation overflowed",  # of a tensor that no memory would hold
)


class OutOfMemory(UserError):
    """Images take more memory than there is."""


def tells_shortage(error: Exception) -> bool:
    """Return whether an error says that memory could not be had."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _SHORT)


def reason_of(shortage: Exception) -> str:
    """Return what a library says of memory that could not be had, in a line."""
    lines = str(shortage).splitlines() or ["none left"]
    return next((line for line in lines if any(words in line for words in _SHORT)), lines[0]).strip()


def shortage_of(error: Exception) -> OutOfMemory | None:
    """Return what to raise for an error that says that memory could not be had; None for others."""
    if not tells_shortage(error):
        return None
    return OutOfMemory(
        f"Memory did not suffice ({reason_of(error)}). Free some. A training takes less with a smaller backbone, head "
        "or batch: mode=plan says what would fit."
    )


@contextmanager
def telling_shortage(rows: Rows) -> Iterator[None]:
    """Turn what libraries say where memory cannot be had into a message; other errors pass as they are.

    Raises:
        OutOfMemory: naming the images that are predicted.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not tells_shortage(error):
            raise
        raise OutOfMemory(
            f"There is not enough memory to predict {described(rows)} ({reason_of(error)}). "
            "Free some; or give inference=windows, of a smaller inference.size or with inference.batch_size=1; or "
            "fewer images at once; or resolution.longest=N, by which the model sees them smaller."
        ) from None


def described(rows: Rows) -> str:
    """Return how many images of which size there are, in words."""
    images = f"{rows.count} images" if rows.count > 1 else "an image"
    return f"{images} of {rows.size[1]} x {rows.size[0]} (width x height)"


class PeakBytes(TorchDispatchMode):
    """Count the bytes of the tensors that operations make, and their most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                size = storage.nbytes()
                self._known[storage] = size
                weakref.finalize(storage, self._free, self._take(size))
        return made

    def _take(self, size: int) -> Any:
        self.now += size
        self.most = max(self.most, self.now)
        return size

    def _free(self, taken: Any) -> None:
        self.now -= taken


@dataclass(frozen=True)
class PassCost:
    """What tensors of a pass over one image take beside the weights: by pixels that the backbone sees, and predicted.

    Attributes:
        forward: bytes a pixel seen, at most while the model runs.
        squared: bytes a pixel seen and pixel seen, where attention is written out.
        kept: bytes a pixel seen of the head's outputs.
        scores: bytes a pixel predicted, at most while class ids are made of the outputs.
    """

    forward: float
    squared: float
    kept: float
    scores: float

    def of(self, images: int, seen: Size, size: Size) -> float:
        """Return the bytes for images that the backbone sees at (h, w) and that are predicted at (H, W)."""
        pixels = math.prod(seen)
        forward = self.forward * pixels + self.squared * pixels**2
        return images * max(forward, self.kept * pixels + self.scores * math.prod(size))


def measure(model: Segmenter, side: int, autocast: Autocast) -> PassCost:
    """Measure passes over two small black squares.

    What a single operation takes for itself is not seen.

    Args:
        model: a segmenter in eval mode.
        side: about that of the larger square, in pixels of the image.
        autocast: the precision's context.
    """
    patch = model.patch_size / model.scale
    cells = max(1, round(side / patch / 2))
    small, large = (_taken(model, round(number * patch), autocast) for number in (cells, 2 * cells))
    growth = (large.forward - small.forward) / large.forward
    squared = (large.forward - small.forward) / (large.pixels - small.pixels) if growth > _NOISE else 0.0
    forward = large.forward - squared * large.pixels
    return PassCost(forward, squared, large.kept, large.scores)


class _Taken(NamedTuple):
    """Bytes a pixel."""

    pixels: int
    forward: float
    kept: float
    scores: float


@torch.no_grad()
def _taken(model: Segmenter, side: int, autocast: Autocast) -> _Taken:
    device = next(model.parameters(), torch.empty(0)).device
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
    with PeakBytes() as peak:
        with autocast():
            prediction = model(images, reduce=False)
        forward, kept = peak.most, peak.now
        peak.most = kept
        prediction.class_ids()
    seen = math.prod(backbone_size((side, side), model.scale, None))
    return _Taken(seen, forward / seen, kept / seen, (peak.most - kept) / side**2)


def check_frames(path: Path, size: Size, count: int) -> None:
    """Refuse a video of which so many frames (H, W), with what is made of them, do not go into the free memory.

    Raises:
        UserError: naming its size, and what helps.
    """
    needed, free = _FRAME_BYTES * count * math.prod(size), free_bytes(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"{path} has frames of {size[1]} x {size[0]} pixels; up to {count} of them at a time take "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free. Lower mode.batch_size, or make it smaller "
            "(ffmpeg -i IN -vf scale=1920:-2 OUT.mp4)."
        )


def free_bytes(device: torch.device) -> float:
    """Return how much memory is free on a device; of a CPU what this process may take, control groups included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min(_available(), _addresses(), *(limit - used for limit, used in _group_limits()))


def _available() -> float:
    """Return the bytes that the machine has available."""
    for line in read_text(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float(psutil.virtual_memory().available)  # of macOS and Windows


def _addresses() -> float:
    """Return what a limit of this process's address space (`ulimit -v`) leaves, without end where there is none."""
    if sys.platform == "win32":
        return math.inf
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = read_text(PROC / "self/statm").split()
    return limit - int(pages[0]) * resource.getpagesize() if limit != resource.RLIM_INFINITY and pages else math.inf


def _group_limits() -> list[tuple[float, float]]:
    """Return limit and use of the control groups that this process is in."""
    return [limit for folder in group_folders("memory") for limit in _limit(folder)]


def _limit(folder: Path) -> list[tuple[float, float]]:
    for limit, usage, dropped in _FILES:
        texts = read_text(folder / limit).strip(), read_text(folder / usage).strip()
        if all(text.isdecimal() for text in texts):  # one without a limit says max
            stat = dict(line.split() for line in read_text(folder / "memory.stat").splitlines())
            return [(float(texts[0]), float(texts[1]) - float(stat.get(dropped, 0)))]
    return []
