"""What computes for a model in one file: torch, or another runtime where torch is not installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dinoseg.export.runtime.facts import Facts

FILES = {"torch": "model.safetensors", "onnx": "model.onnx"}  # runtime to the name of its file


class Runtime(Protocol):
    """Pictures of one size to classes of the same size. An implementation may not need torch."""

    name: str  # torch | onnx

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size."""
        ...

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        ...


class Opened(NamedTuple):
    """What computes for a model, what the model says of itself, and its file, if it is a model in one file."""

    runtime: Runtime
    facts: Facts
    file: Path | None = None


@dataclass(frozen=True)
class Options:
    """How the file of a trained model is opened: the arguments of `dinoseg.load`, which says what they mean."""

    device: str = "auto"
    runtime: str | None = None
    precision: str = "auto"
    backbone: str | PathLike[str] | None = None
    head: str | PathLike[str] | None = None
    inference: str | None = None
    trust: Sequence[str] = ()


def file_in(folder: Path, runtime: str | None) -> Path | None:
    """Return the model in one file that a folder holds, for a runtime or any; None where there is none."""
    names = [FILES[runtime]] if runtime in FILES else FILES.values()
    return next((folder / name for name in names if (folder / name).is_file()), None)
