"""File format of cached features: tensors rounded to a type, stored as bytes after a validated header."""

import json
import math
import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dinoseg.utils import forms
from dinoseg.utils.errors import UserError

Stored = Literal["float32", "float16", "bfloat16", "int8"]
TYPES: tuple[Stored, ...] = get_args(Stored)
KEY_LENGTH = 32
MAX_BYTES = 2**30  # maximum size of a sample's file

_MAGIC = b"dinoseg features 2\n"
_START = len(_MAGIC) + 4  # the checksum of everything after it lies between
_ALIGN = 64  # bytes, a cache line
_LONGEST_HEADER = 2**16
_DTYPES: dict[Stored, torch.dtype] = {name: getattr(torch, name) for name in TYPES}
_FORM = forms.record(
    key=forms.text,
    stored=forms.text,
    bytes=forms.listing(forms.whole()),  # indices of the tensors that are bytes
    shapes=forms.listing(forms.listing(forms.whole(1, MAX_BYTES))),
)


def described(tensors: Sequence[Tensor]) -> str:
    """Return the shapes of a sample's tensors, and which of them are bytes: all that users of the cache rely on."""
    kinds = ((tuple(tensor.shape), " of bytes" if tensor.dtype == torch.uint8 else "") for tensor in tensors)
    return f"[{', '.join(f'{shape}{kind}' for shape, kind in kinds)}]"


def rounded(tensors: Sequence[Tensor], stored: Stored) -> list[Tensor]:
    """Return tensors in the type in which they are stored; with int8, each is followed by its scales.

    There is one scale per token, that is, over the channels, which are the last axis. If a sample has numbers that
    float16 cannot represent, all its numbers are stored in bfloat16, which takes the same space. Tensors of bytes
    (uint8: pixels) are stored unchanged.

    Raises:
        UserError: a number is not finite, or would not be in the stored type.
    """
    converted: list[Tensor] = []
    for tensor in (tensor.detach().cpu() for tensor in tensors):
        if not _is_finite(tensor):
            raise UserError(
                "The frozen part of the model returns features that are not finite. Check its weights and the images, "
                "or set engine.precision=fp32."
            )
        if tensor.dtype == torch.uint8:
            converted.append(tensor.contiguous())
        else:
            converted += _quantised(tensor.float()) if stored == "int8" else [tensor.to(_DTYPES[stored]).contiguous()]
        if not _is_finite(converted[-1]):
            if stored == "float16":
                return rounded(tensors, "bfloat16")
            raise UserError(
                f"Features as large as {tensor.float().abs().max():.3g} overflow in {stored}, the type of the cache. "
                "Set features.dtype=float32, or engine.cache=off."
            )
    return converted


def type_of(tensors: Sequence[Tensor], stored: Stored) -> Stored:
    """Return the type that `rounded` has chosen for a sample to be stored in `stored`."""
    wider = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return "bfloat16" if stored == "float16" and wider else stored


def restored(tensors: Sequence[Tensor], stored: Stored) -> list[Tensor]:
    """Return tensors for use: those of int8 are converted to float32, others are returned unchanged."""
    parts = iter(tensors)
    return [part.float() * next(parts)[..., None] if part.dtype == torch.int8 else part for part in parts]


def size_of(tensors: Sequence[Tensor], stored: Stored) -> int:
    """Return the file size in bytes of a sample with such tensors."""
    start = _aligned(len(_header("0" * KEY_LENGTH, tensors, stored)))
    return _places(start, [tensor.shape for tensor in tensors], _bytes_among(tensors), stored)[1]


def to_bytes(key: str, tensors: Sequence[Tensor], stored: Stored) -> bytes:
    """Return the content of a sample's file, from the tensors that `rounded` returned.

    Raises:
        UserError: it exceeds the size that would be read back.
    """
    values = [tensor for tensor in tensors if tensor.dtype != torch.float32] if stored == "int8" else tensors
    parts = [_padded(_header(key, values, type_of(tensors, stored)))]
    parts += [_padded(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()) for tensor in tensors]
    content = b"".join(parts)
    if len(content) > MAX_BYTES:
        raise UserError(
            f"The features of one image take {len(content) / 2**20:.0f} MiB; the limit is {MAX_BYTES / 2**20:.0f}. "
            "Set engine.cache=off, or reduce the images: resolution.longest."
        )
    return _MAGIC + _checksum(memoryview(content)[_START:]) + content[_START:]


def from_bytes(key: str, data: np.ndarray, stored: Stored, *, verify: bool) -> list[Tensor]:
    """Return the tensors that `to_bytes` was given; they share the memory of the file.

    Args:
        key: expected key.
        data: the whole file, uint8.
        stored: expected type, see `rounded`.
        verify: whether to verify the checksum and that all numbers are finite.

    Raises:
        Misshapen: the file has another format or content, or is damaged.
    """
    start = data[: _START + _LONGEST_HEADER].tobytes()
    if not start.startswith(_MAGIC):
        raise forms.SchemaError("it is not a feature file")
    if verify and _checksum(data[_START:].data) != start[len(_MAGIC) : _START]:
        raise forms.SchemaError("its checksum differs")
    text, newline, _ = start[_START:].partition(b"\n")
    header = forms.parse_json(text, _FORM)
    held = "bfloat16" if (stored, header["stored"]) == ("float16", "bfloat16") else stored
    if not newline or (header["key"], header["stored"]) != (key, held) or not all(header["shapes"]):
        raise forms.SchemaError("it belongs to other features")
    places, end = _places(_aligned(_START + len(text) + 1), header["shapes"], header["bytes"], held)
    if end != len(data):
        raise forms.SchemaError(f"it has {len(data)} bytes instead of {end}")
    tensors = [
        torch.from_numpy(data[offset : offset + size]).view(dtype).view(shape) for offset, size, dtype, shape in places
    ]
    if verify and not all(map(_is_finite, tensors)):
        raise forms.SchemaError("it holds values that are not finite")
    return tensors


def _header(key: str, tensors: Sequence[Tensor], stored: Stored) -> bytes:
    """Return the beginning of a file, with an empty checksum."""
    shapes = [list(tensor.shape) for tensor in tensors]
    content = {"key": key, "stored": stored, "bytes": _bytes_among(tensors), "shapes": shapes}
    return _MAGIC + bytes(_START - len(_MAGIC)) + json.dumps(content).encode() + b"\n"


def _bytes_among(tensors: Sequence[Tensor]) -> list[int]:
    return [number for number, tensor in enumerate(tensors) if tensor.dtype == torch.uint8]


def _places(
    offset: int, shapes: Sequence[Sequence[int]], whole: Sequence[int], stored: Stored
) -> tuple[list[tuple[int, int, torch.dtype, Sequence[int]]], int]:
    """Return offset, size in bytes, type and shape of all stored tensors from `offset` on, and the end offset.

    `whole` has the indices of the tensors that are bytes.
    """
    parts = []
    for number, shape in enumerate(shapes):
        parts.append((torch.uint8 if number in whole else _DTYPES[stored], shape))
        if stored == "int8" and number not in whole:
            parts.append((torch.float32, shape[:-1]))
    places = []
    for dtype, shape in parts:
        size = math.prod(shape) * dtype.itemsize
        places.append((offset, size, dtype, shape))
        offset = _aligned(offset + size)
    return places, offset


def _quantised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127, and the scale of each token."""
    scales = tensor.abs().amax(-1) / 127
    divisor = torch.where(scales > 0, scales, 1)[..., None]
    return (tensor / divisor).round().to(torch.int8).contiguous(), scales


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or math.isfinite(tensor.abs().amax())


def _checksum(content: memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _padded(content: bytes) -> bytes:
    return content + bytes(_aligned(len(content)) - len(content))


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
