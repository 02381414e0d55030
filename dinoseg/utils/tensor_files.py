"""Tensor files: published ones, read without running code from them, and our own."""

import argparse
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoseg.utils.atomic import scratch_folder, sync_to_disk
from dinoseg.utils.errors import UserError, free_space
from dinoseg.utils.wording import count_of, format_value

_TYPES = {  # names in a safetensors header
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_LONGEST = 2**63 - 1  # largest side of a tensor
_EXACT = (torch.int16, torch.int32, torch.int64)  # types of counters, not of quantised weights
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SERIAL = 2**15  # values in an operation that torch does not distribute over threads (at::internal::GRAIN_SIZE)
_FEW = 2**22  # values of a tensor that is processed in such pieces
PICKLED = (".pth", ".pt", ".bin")  # PyTorch's own format; other files are read as safetensors
_MAX_STEPS = 2_000_000  # of a pickle, 64 to 216 bytes each; a ViT-7B with its optimizer's state takes 200,000
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
        SafetensorError: if its type is unsupported, such as F4, or a side exceeds the limit of a tensor.
    """
    part = file.get_slice(key)
    if (kind := part.get_dtype()) not in _TYPES:
        raise SafetensorError(
            f"{format_value(key)} has the type {format_value(kind)}, which is not one of {', '.join(_TYPES)}"
        )
    shape = part.get_shape()
    if any(side > _LONGEST for side in shape):
        raise SafetensorError(f"{format_value(key)} has the shape {shape}, but the limit per side is {_LONGEST}")
    return torch.empty(shape, dtype=_TYPES[kind], device="meta")


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
        expected: the model's own tensors, which determine the required shapes. Tensors that are not floating-point,
            such as counters, need values that their type can represent. Tensors missing here are not checked.

    Raises:
        UserError: if any tensor is invalid; the message names the first one and the number of others.
    """
    known = tensors if expected is None else {name: value for name, value in tensors.items() if name in expected}
    wrong = {}
    for name, value in known.items():
        reference = value if expected is None else expected[name]
        kind = str(value.dtype).removeprefix("torch.")
        if value.shape != reference.shape:
            wrong[name] = f"has the shape {list(value.shape)} instead of {list(reference.shape)}"
        elif expected is not None and not reference.is_floating_point():
            if value.dtype != reference.dtype and not _casts_exactly(value, reference.dtype):
                wrong[name] = f"is {kind} instead of {str(reference.dtype).removeprefix('torch.')}"
        elif value.dtype not in _WEIGHTS:
            wrong[name] = f"is {kind}; weights must be floating-point"
        elif not value.is_meta and not is_finite(value):
            wrong[name] = "holds NaN or infinity"
    if wrong:
        name, what = next(iter(wrong.items()))
        others = f" ({count_of(len(wrong) - 1, 'more tensor')} cannot be used either)" if len(wrong) > 1 else ""
        raise UserError(
            f"{where}: {format_value(name)} {what}{others}. Download or export the weights again, unquantised."
        )


def _casts_exactly(value: Tensor, dtype: torch.dtype) -> bool:
    """Return whether an unquantised tensor casts to `dtype` without changing its values; those on meta are unknown."""
    exact = value.dtype in (*_WEIGHTS, *_EXACT)
    return exact and (value.is_meta or torch.equal(value.to(dtype).to(value.dtype), value))


def check_file(path: Path, key: str) -> None:
    """Refuse a path that is no file.

    Raises:
        UserError: if there is no file; the message names `key`, the config key of the path.
    """
    if not path.is_file():
        raise UserError(f"{key}={path}: file not found. Check the path.")


def _read_safetensors(path: Path, key: str) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a side beyond 64 bits
        raise UserError(
            f"{key}={path}: not a readable safetensors file ({error}). Download or export it again."
        ) from error


def _read_pickled(path: Path, key: str) -> Any:
    try:
        check_pickles(path)
        # DINO's full checkpoints store their command line in a Namespace, which is harmless to construct
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
        check_views(content, path.stat().st_size)
        return content
    except ForeignObject as error:
        raise UserError(
            f"{key}={path}: holds objects besides tensors ({error}), and reading those could run code or exhaust "
            "memory. Give a file of tensors only, or a safetensors file."
        ) from error
    except Exception as error:  # a broken file raises many exception types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{key}={path}: not a readable PyTorch file ({reason}). Download it again.") from error


class ForeignObject(ValueError):
    """Error for a pickle that names an object which no file of weights needs; its text is that name."""


def is_archive(path: Path) -> bool:
    """Return whether torch reads a file as a zip archive: the format since torch 1.6."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_pickles(path: Path) -> None:
    """Refuse a PyTorch file that may run code or take much more memory than it has bytes.

    Raises:
        ForeignObject: its pickle names an object that weights do not consist of.
        ValueError: it has too many steps, is compressed or damaged.
        zipfile.BadZipFile: it is no zip archive, although it begins like one.
    """
    with open(path, "rb") as file:
        if not is_archive(path):
            return _check_steps(file, _PARTS)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = {entry.filename.lower() for entry in entries}  # torch ignores case
            size = path.stat().st_size
            if len(names) < len(entries) or sum(entry.file_size for entry in entries) > size:
                raise ValueError("entries of its archive have the same name or are larger than the file")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("entries of its archive are compressed")
            for entry in entries:
                if entry.filename.lower().endswith(".pkl"):
                    with io.BufferedReader(archive.open(entry)) as stream:  # type: ignore[type-var]
                        _check_steps(stream, 1)


def check_views(content: Any, most: int) -> None:
    """Refuse tensors of more than `most` bytes, in dicts of dicts: a view may repeat one stored value.

    Raises:
        ValueError: there is one.
    """
    seen: set[int] = set()
    values = [content]
    while values:
        value = values.pop()
        if isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            values += value.values()
        elif isinstance(value, Tensor) and value.numel() * value.element_size() > most:
            raise ValueError(f"a tensor of the shape {list(value.shape)} is larger than the file")


def _check_steps(stream: BinaryIO, parts: int) -> None:
    """Refuse pickles, one after another in a stream, by their names and their number of steps."""
    steps = 0
    for _ in range(parts):
        for code, argument, _ in pickletools.genops(stream):
            steps += 1
            if code.name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):
                raise ForeignObject(str(argument).replace(" ", "."))
            if steps > _MAX_STEPS:
                raise ValueError(f"its pickle has more than {_MAX_STEPS} steps")
