"""Files of tensors: those that others publish, read without running anything in them, and those that we write."""

import argparse
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoseg.errors import UserError, free_space
from dinoseg.storage.atomic import scratch_folder

PICKLED = (".pth", ".pt", ".bin")  # PyTorch's own format; other files are taken for safetensors


def read_tensor_file(path: Path, key: str) -> Mapping[str, Any]:
    """Return what a safetensors file or a PyTorch checkpoint holds by name; of the latter's pickle nothing is run.

    Args:
        path: ends with .pth, .pt or .bin if it is PyTorch's; tensors of such a file are mapped, not copied.
        key: the config key that names the file, for errors.

    Raises:
        UserError: no such file, a broken one, or one that holds objects which only code could make.
    """
    check_file(path, key)
    content = _read_pickled(path, key) if path.suffix in PICKLED else _read_safetensors(path, key)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{key}={path}: holds no tensors by name. Give a file of weights.")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to the disk, then rename it.

    Raises:
        UserError: it cannot be written (a full disk, no permission); an older file of that name stays as it was.
    """
    try:
        with scratch_folder(path.parent, path.name) as folder:  # safetensors gives its file a name by chance
            part = folder / path.name
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, header)
            part.chmod(0o644)  # safetensors leaves it to the owner alone: a run folder is for the group to read
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({error}); {free_space(path)} there. Make room and run it again, with "
            f"resume= for a training run and mode.restart= for mode=track: what was saved before is untouched."
        ) from error


def check_file(path: Path, key: str) -> None:
    """Refuse a path that is no file.

    Raises:
        UserError: naming `key`, the config key that says the path.
    """
    if not path.is_file():
        raise UserError(f"{key}={path}: no such file. Check the path.")


def _read_safetensors(path: Path, key: str) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{key}={path}: not a readable safetensors file ({error}). Download or export it again."
        ) from error


def _read_pickled(path: Path, key: str) -> Any:
    try:
        # DINO's full checkpoints keep their command line in a Namespace, which does nothing when it is made
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken file raises whatever its bytes happen to mean
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise UserError(
                f"{key}={path}: holds objects besides tensors ({foreign[1]}), and reading those could run code. Give a "
                f"file of tensors only, as they are published, or as safetensors."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{key}={path}: not a readable PyTorch file ({reason}). Download it again.") from error
