"""Checks of a PyTorch file of weights before torch reads it: what its pickle may name, and what that may cost.

torch's weights-only loader runs no code, but `bytearray(10**10)`, text that is encoded again and again and deflated
entries of a zip archive fill the memory from a file of a few bytes.
"""

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

_MOST_STEPS = 2_000_000  # of a pickle, 64 to 216 bytes each; a ViT-7B with its optimizer's state takes 200,000
_PARTS = 5  # pickles that torch's format without a zip archive begins with
_NAMES = re.compile(  # of what weights are saved with: tensors in dicts, and plain options of the training
    r"collections (OrderedDict|Counter)|argparse Namespace|(__builtin__|builtins) (set|complex)"
    r"|torch ([A-Z]\w*Storage|Size|device|bool|[a-z]+\d\w*)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|qtensor|parameter|parameter_with_state)"
    r"|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)


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
            if steps > _MOST_STEPS:
                raise ValueError(f"its pickle has more than {_MOST_STEPS} steps")
