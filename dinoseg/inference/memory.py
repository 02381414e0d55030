"""How much memory a forward pass needs, without taking it, and how much is free."""

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinoseg.inference.policy import Autocast
from dinoseg.model import Segmenter, Size

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# (limit, usage, what of it is files that can be dropped) of both versions of control groups
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class _Peak(TorchDispatchMode):
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
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, size)
        return made

    def _free(self, size: int) -> None:
        self.now -= size


def pass_bytes(model: Segmenter, images: int, size: Size, to: Size, autocast: Autocast) -> int:
    """Return the bytes that tensors of a forward pass and its class ids take at most, beside the weights.

    The pass is run on tensors without numbers. What a single operation takes for itself is not seen.

    Args:
        model: a segmenter in eval mode.
        images: in a batch.
        size: (H, W) of them.
        to: (H, W) of the scores.
        autocast: the precision's context.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds, and few runs need it

    device = next(model.parameters(), torch.empty(0)).device
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Peak() as peak:
        batch = torch.empty(images, 3, *size, dtype=torch.uint8, device=device)
        with autocast():
            prediction = model(batch)
        prediction.scores(to).max(dim=1).indices.to(torch.uint8)
    return peak.most


def free_bytes(device: torch.device) -> float:
    """Return how much memory is free on a device; of a CPU what this process may take, control groups included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min(_available(), *(limit - used for limit, used in _group_limits()), float("inf"))


def _available() -> float:
    """Return what the machine has to give, without end where it does not say."""
    for line in _text(_PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    names: Mapping[str, int] = getattr(os, "sysconf_names", {})
    known = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else float("inf")


def _group_limits() -> list[tuple[float, float]]:
    """Return limit and use of the control groups that this process is in."""
    limits = []
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            own = root / path.lstrip("/")
            limits += [
                limit for folder in (own, *own.parents) if folder.is_relative_to(root) for limit in _limit(folder)
            ]
    return limits


def _limit(folder: Path) -> list[tuple[float, float]]:
    for limit, usage, dropped in _FILES:
        texts = _text(folder / limit).strip(), _text(folder / usage).strip()
        if all(text.isdecimal() for text in texts):  # one without a limit says max
            stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
            return [(float(texts[0]), float(texts[1]) - float(stat.get(dropped, 0)))]
    return []


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
