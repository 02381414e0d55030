"""Messages between ranks: JSON and arrays instead of pickles, so that whoever joins can send values, but no code."""

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dinoseg.utils.errors import UserError

_TEXT = "json"  # name of the JSON text among the arrays, whose names are numbers


def encode_message(value: Any) -> bytes:
    """Return a value as bytes.

    Args:
        value: numbers, text, booleans, None and arrays, in lists, tuples and dicts of any depth.

    Raises:
        TypeError: the value contains another type.
    """
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_to_json(value, arrays)).encode()
    return save({**arrays, _TEXT: np.frombuffer(text, np.uint8)})


def decode_message(content: bytes) -> Any:
    """Return the value of `encode_message`, with the same types; numpy's scalars become Python's.

    Raises:
        UserError: the bytes are no such message.
    """
    try:
        arrays = load(content)
        return _from_json(json.loads(arrays[_TEXT].tobytes()), arrays)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"Received {len(content)} bytes that are not a message of a rank ({type(error).__name__}). Start all ranks "
            "with the same version of dinoseg, on a network that only you use."
        ) from error


def _to_json(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return a value as JSON, in which each object is one of the tags `tuple`, `dict` and `array`."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_to_json(each, arrays) for each in value]
    if type(value) is tuple:
        return {"tuple": [_to_json(each, arrays) for each in value]}
    if type(value) is dict:
        return {"dict": [[_to_json(each, arrays) for each in pair] for pair in value.items()]}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        name = str(len(arrays))
        arrays[name] = np.asarray(value, order="C")  # safetensors mixes up the values of others
        return {"array": name}
    raise TypeError(f"ranks exchange plain values and arrays, not {type(value).__name__}")


def _from_json(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_from_json(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "array":
        return arrays[content]
    items = _from_json(content, arrays)
    return {"tuple": tuple, "dict": dict}[tag](items)
