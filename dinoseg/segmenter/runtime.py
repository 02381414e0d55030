"""The interface of runtimes: torch, or another one where torch is not installed."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dinoseg.core.objects import Objects
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.utils.errors import UserError

MODEL_FILE = "model.safetensors"  # of torch
_CONFIGS = Path(__file__).parents[1] / "cfg"  # runtime/ has an option for each runtime without torch


class Runtime(Protocol):
    """Interface that maps images of one size to classes at the same size. An implementation may not need torch."""

    name: str  # torch | onnx

    @property
    def task(self) -> str:
        """`semantic`, `instance` or `panoptic`; `multilabel`: masks have a layer for each class."""
        ...

    @property
    def things(self) -> Collection[int]:
        """Ids of the classes that have objects; empty if the model predicts no objects."""
        ...

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W)."""
        ...

    def predict(self, images: Sequence[np.ndarray]) -> Sequence[tuple[np.ndarray, Objects | None]]:
        """Return for each image what `ids` does, and its objects from the same passes; None without objects."""
        ...

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        ...


class Opened(NamedTuple):
    """Arguments of `Model`: its runtime, its facts, and its file if it is a one-file model."""

    runtime: Runtime
    facts: ModelFacts
    file: Path | None = None


@dataclass(frozen=True)
class Options:
    """Options for opening a trained model: the arguments of `dinoseg.load`, where they are documented."""

    device: str = "auto"
    runtime: str | None = None
    precision: str = "auto"
    backbone: str | PathLike[str] | None = None
    head: str | PathLike[str] | None = None
    inference: str | None = None
    trust: Sequence[str] = ()
    config_dir: str | PathLike[str] | None = None


def list_model_files() -> dict[str, str]:
    """Return the name of a one-file model for each runtime: torch, and the options of `runtime`."""
    names = sorted(path.stem for path in _CONFIGS.glob("runtime/*.yaml"))
    return {"torch": MODEL_FILE, **{name: f"model.{name}" for name in names}}


def load_opener(runtime: str) -> Callable[[Path, Options], Any]:
    """Return the function that opens the files of a runtime, which the `_target_` of its option names.

    The line is read without a YAML parser: predictions of ONNX files need NumPy, Pillow and onnxruntime alone.
    """
    return _load_target(_CONFIGS / f"runtime/{runtime}.yaml")


def load_ensemble() -> Callable[..., Any]:
    """Return the class of ensembles, see `load_opener`.

    Raises:
        UserError: this installation has none.
    """
    option = _CONFIGS / "inference/_ensemble.yaml"
    if not option.is_file():
        raise UserError("path is a list, and this installation has no ensembles. Give one model.")
    return _load_target(option)


def _load_target(option: Path) -> Callable[..., Any]:
    text = option.read_text(encoding="utf-8")
    target = next(line.removeprefix("_target_: ") for line in text.splitlines() if line.startswith("_target_: "))
    module, _, name = target.strip().rpartition(".")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def file_in(folder: Path, runtime: str | None) -> Path | None:
    """Return the one-file model in a folder, for one runtime or any; None where there is none."""
    return next((folder / name for name in names_of_files(runtime) if (folder / name).is_file()), None)


def names_of_files(runtime: str | None) -> list[str]:
    """Return the names of one-file models of a runtime; of all for None or an unknown one."""
    files = list_model_files()
    return [files[runtime]] if runtime in files else [*files.values()]
