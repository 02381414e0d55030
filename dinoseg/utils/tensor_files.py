"""Tensor files: published ones, read without running code from them, and our own."""

import argparse
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoseg.utils.atomic import scratch_folder, sync_to_disk
from dinoseg.utils.errors import UserError, free_space
from dinoseg.utils.files import PICKLED, check_file, open_regular
from dinoseg.utils.wording import count_of, format_text

_TYPES = {  # names in a safetensors header
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SERIAL = 2**15  # values in an operation that torch does not distribute over threads (at::internal::GRAIN_SIZE)
_FEW = 2**22  # values of a tensor that is processed in such pieces
_PARTS = 5  # pickles that torch's format without a zip archive begins with
_NAMES = re.compile(  # of what weights are saved with: tensors in dicts, and plain options of the training
    r"collections (OrderedDict|Counter)|argparse Namespace|(__builtin__|builtins) (set|complex)"
    r"|torch ([A-Z]\w*Storage|Size|device|bool|[a-z]+\d\w*)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|qtensor|parameter|parameter_with_state)"
    r"|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)


def read_tensor_file(path: Path, key: str) -> Mapping[str, Any]:
    """Read a safetensors file or a PyTorch checkpoint, by name; pickled code is never run.

    Args:
        path: a suffix .pth, .pt or .bin marks PyTorch's format, whose tensors are memory-mapped instead of copied.
        key: the config key that names the file, for errors.

    Raises:
        UserError: if the file is missing or broken, or holds objects that only code can create.
    """
    check_file(path, key)
    content = _read_pickled(path, key) if path.suffix in PICKLED else _read_safetensors(path, key)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{key}={path}: holds no named tensors. Give a file of weights.")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to the disk, then rename it.

    Raises:
        UserError: if it cannot be written (full disk, no permission); an older file of that name stays as it was.
    """
    try:
        with scratch_folder(path.parent, path.name) as folder:  # safetensors writes under a random name
            part = folder / path.name
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, header)
            part.chmod(0o644)  # safetensors restricts the file to its owner, but a run folder is readable by the group
            sync_to_disk(part)
            os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({error}); {free_space(path)} there. Free some space and run it again, with "
            "resume= for a training and mode.restart= for mode=track: earlier files are unchanged."
        ) from error


def meta_tensor(file: Any, key: str) -> Tensor:
    """Return the shape and type of a tensor in an open safetensors file, on the meta device; no values are read.

    Raises:
        SafetensorError: if its type is unsupported, such as F4.
    """
    part = file.get_slice(key)
    if (kind := part.get_dtype()) not in _TYPES:
        raise SafetensorError(
            f"{format_text(key)} has the type {format_text(kind)}, which is not one of {', '.join(_TYPES)}"
        )
    return torch.empty(part.get_shape(), dtype=_TYPES[kind], device="meta")


def check_openable(path: Path) -> None:
    """Raise the system's error if a file cannot be opened: safetensors calls each such file missing.

    Raises:
        OSError: such as `PermissionError` for a file of another user.
        UserError: if it is no regular file.
    """
    open_regular(path).close()


def outline(path: Path) -> dict[str, Tensor]:
    """Return the shapes and types of the tensors in a valid safetensors file, on the meta device.

    Raises:
        SafetensorError: as `meta_tensor`.
    """
    with safe_open(path, framework="pt") as file:
        return {key: meta_tensor(file, key) for key in file.keys()}  # noqa: SIM118, since it is no mapping


def is_finite(value: Tensor) -> bool:
    """Return whether a tensor is free of NaN and infinity, in one pass without a copy."""
    ends = (end for part in _pieces(value) if part.numel() for end in torch.aminmax(part))  # aminmax propagates NaN
    return all(bool(torch.isfinite(end)) for end in ends)


def copy_values(target: Tensor, source: Tensor) -> None:
    """Copy the values of `source` into `target`, a tensor of the same shape that requires no gradient."""
    if type(target) is Tensor and target.is_contiguous() and source.is_contiguous():  # no DTensor
        for piece, value in zip(_pieces(target), _pieces(source), strict=True):
            piece.copy_(value)
    else:
        target.copy_(source)


def _pieces(value: Tensor) -> Sequence[Tensor]:
    """Return a small tensor as pieces that torch processes on the calling thread, and a large one whole.

    Threads wait for one another at the end of each operation. On a busy machine, that takes longer than an operation
    on a few million values.
    """
    return value.flatten().split(_SERIAL) if value.numel() <= _FEW else (value,)


def check_weights(tensors: Mapping[str, Tensor], where: str, expected: Mapping[str, Tensor] | None = None) -> None:
    """Refuse weights that are not finite floating-point tensors.

    Args:
        tensors: by name.
        where: config key and file, which begin the message.
        expected: the model's own tensors, which determine the required shapes. Those that are not floating-point, such
            as counters, may have any type. Tensors missing here are not checked.

    Raises:
        UserError: if any tensor is invalid; the message names the first one and the number of others.
    """
    known = tensors if expected is None else {name: value for name, value in tensors.items() if name in expected}
    wrong = {}
    for name, value in known.items():
        reference = value if expected is None else expected[name]
        is_weight = expected is None or reference.is_floating_point()
        if value.shape != reference.shape:
            wrong[name] = f"has the shape {list(value.shape)} instead of {list(reference.shape)}"
        elif is_weight and value.dtype not in _WEIGHTS:
            wrong[name] = f"is {str(value.dtype).removeprefix('torch.')}; weights must be floating-point"
        elif is_weight and not value.is_meta and not is_finite(value):
            wrong[name] = "holds NaN or infinity"
    if wrong:
        name, what = next(iter(wrong.items()))
        others = f" ({count_of(len(wrong) - 1, 'more tensor')} cannot be used either)" if len(wrong) > 1 else ""
        raise UserError(
            f"{where}: {format_text(name)} {what}{others}. Download or export the weights again, unquantised."
        )


def _read_safetensors(path: Path, key: str) -> Any:
    try:
        check_openable(path)
        return load_file(path)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a side beyond 64 bits
        raise UserError(
            f"{key}={path}: not a readable safetensors file ({error}). Download or export it again."
        ) from error


def _read_pickled(path: Path, key: str) -> Any:
    try:
        is_archive = zipfile.is_zipfile(path)  # the format since torch 1.6
        _check_pickles(path, is_archive)
        # DINO's full checkpoints store their command line in a Namespace, which is harmless to construct
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # a broken file raises many exception types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"{key}={path}: not a readable PyTorch file of tensors only ({reason}). Download it again, or give a "
            "safetensors file."
        ) from error


def _check_pickles(path: Path, is_archive: bool) -> None:
    """Refuse a PyTorch file from which torch would create other objects than tensors, or unpack more than its bytes.

    torch refuses to run code, but not to fill the memory.
    """
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(open(path, "rb"))
        streams = [file] * _PARTS
        if is_archive:
            archive = stack.enter_context(zipfile.ZipFile(file))
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("the entries of its archive are larger than the file")
            # torch ignores case
            streams = [archive.open(entry) for entry in entries if entry.filename.lower().endswith(".pkl")]
        for stream in streams:
            for code, argument, _ in pickletools.genops(stream):
                if code.name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):
                    raise ValueError(f"it holds {str(argument).replace(' ', '.')}")
