"""File format of cached features: tensors rounded to a type, as safetensors behind a checksum."""

import math
import zlib
from collections.abc import Sequence
from typing import BinaryIO, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import SchemaError
from dinoseg.utils.units import KEY_LENGTH

Stored = Literal["float32", "float16", "bfloat16", "int8"]
TYPES: tuple[Stored, ...] = get_args(Stored)
MAX_BYTES = 2**30  # maximum size of a sample's file

_CHECKSUM = 4  # bytes, of everything after it
_DTYPES: dict[Stored, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


def round_features(tensors: Sequence[Tensor], stored: Stored) -> list[Tensor]:
    """Return tensors in the type in which they are stored; with int8, each is followed by its scales.

    There is one scale per token, that is, over the channels, which are the last axis. If a sample has numbers that
    float16 cannot represent, all its numbers are stored in bfloat16, which takes the same space. Pixels
    (uint8 or uint16) are stored unchanged.

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
        if not tensor.is_floating_point():
            converted.append(tensor.contiguous())
        elif stored == "int8":
            converted += _quantise_tokens(tensor.float())
        else:
            converted.append(tensor.to(_DTYPES[stored]).contiguous())
        if not _is_finite(converted[-1]):
            if stored == "float16":
                return round_features(tensors, "bfloat16")
            raise UserError(
                f"Features as large as {tensor.float().abs().max():.3g} overflow in {stored}, the type of the cache. "
                "Set features.dtype=float32, or engine.cache=off."
            )
    return converted


def restore_features(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors for use: those of int8 are converted to float32, others are returned unchanged.

    Raises:
        SchemaError: a tensor of int8 has no scale for each token.
    """
    found: list[Tensor] = []
    parts = iter(tensors)
    for part in parts:
        if part.dtype == torch.int8:
            scales = next(parts, None)
            if scales is None or scales.shape != part.shape[:-1]:
                raise SchemaError("it lacks the scales of its numbers")
            part = part.float() * scales[..., None]
        found.append(part)
    return found


def size_of(tensors: Sequence[Tensor], stored: Stored) -> int:
    """Return the file size in bytes of a sample with such tensors; errors: see `round_features`, `to_bytes`."""
    return len(to_bytes("0" * KEY_LENGTH, round_features(tensors, stored)))


def to_bytes(key: str, tensors: Sequence[Tensor]) -> bytes:
    """Return the content of a sample's file, from the tensors that `round_features` returned.

    Raises:
        UserError: it exceeds the size that would be read back.
    """
    content = save({f"{key}.{number}": tensor for number, tensor in enumerate(tensors)})
    if len(content) > MAX_BYTES:
        raise UserError(
            f"The features of one image take {len(content) / 2**20:.0f} MiB; the limit is {MAX_BYTES / 2**20:.0f}. "
            "Set engine.cache=off, or reduce the images: resolution.longest."
        )
    return _checksum(content) + content


def from_file(key: str, file: BinaryIO, *, verify: bool) -> list[Tensor]:
    """Return the tensors whose content `to_bytes` has returned.

    Args:
        key: expected key.
        file: at its start.
        verify: whether to verify the checksum.

    Raises:
        SchemaError: the file has another format or content, or is damaged.
    """
    checksum, content = file.read(_CHECKSUM), file.read()
    if verify and _checksum(content) != checksum:
        raise SchemaError("its checksum differs")
    try:
        tensors = load(content)
        return [tensors[f"{key}.{number}"] for number in range(len(tensors))]
    except SafetensorError as error:
        raise SchemaError(f"it is not a feature file ({error})") from None
    except KeyError:
        raise SchemaError("it belongs to other features") from None


def _quantise_tokens(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127, and the scale of each token."""
    scales = tensor.abs().amax(-1) / 127
    divisor = torch.where(scales > 0, scales, 1)[..., None]
    return (tensor / divisor).round().to(torch.int8).contiguous(), scales


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or math.isfinite(tensor.abs().amax())


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
