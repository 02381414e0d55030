"""Hashes of everything that cached features depend on; features with other hashes are not used."""

import hashlib
import importlib.metadata
import inspect
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dinoseg
from dinoseg.core.contracts import overrides_both
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.extensions.feature_cache.unlabelled import Unmasked
from dinoseg.utils import forms
from dinoseg.utils.atomic import create_cache_dir, write_json
from dinoseg.utils.cores import count_cores
from dinoseg.utils.units import hash_of, read_valid_note
from dinoseg.utils.wording import join_names

log = logging.getLogger(__name__)

_NOTE = "origin.json"
_LIBRARIES = ("torch", "transformers", "timm", "peft", "bitsandbytes", "pillow", "av", "opencv-python-headless")
_SOURCES = (  # source between an image file and its features: folders and files of the package
    *("models", "core/channels.py", "core/contracts.py", "core/geometry.py", "core/sizes.py", "core/shapes.py"),
    "core/sources.py",
    *("data/loader.py", "data/photometric.py", "data/transforms.py"),
    *(f"extensions/video/{name}.py" for name in ("access", "decoder", "index", "length", "pictures")),
    "extensions/packed/read.py",
    *("utils/images.py", "utils/levels.py", "utils/precision.py", "utils/devices.py", "extensions/feature_cache"),
)


def origin(root: Path, parts: Mapping[str, str]) -> str:
    """Return the folder name for features computed in one way; log the difference if `root` has only others.

    Args:
        root: folder of all features, in `cache_dir`.
        parts: everything that the features of every image depend on, by its name for users.
    """
    name = hash_of(*sorted(parts.items()))
    if read_valid_note(root / name / _NOTE, _read) != parts:
        others = [note for path in root.glob(f"*/{_NOTE}") if (note := read_valid_note(path, _read)) is not None]
        differing = [[part for part in parts if note.get(part) != parts[part]] for note in others]
        if all(differing) and others:
            log.info(
                "The features cached in %s were computed with other %s: they are not used, and features are "
                "recomputed.",
                root,
                join_names(min(differing, key=len)),
            )
        with suppress(OSError):  # logged when the first features cannot be written
            create_cache_dir(root.parent)
            write_json(root / name / _NOTE, dict(parts))
    return name


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of tensors: names, shapes, types and all values, in the given order."""
    named = list(tensors)
    with ThreadPoolExecutor(min(count_cores(), len(named) or 1)) as threads:  # hashing releases the GIL
        hashes = threads.map(_tensor_hash, (tensor for _, tensor in named))
        return hash_of(*((name, each) for (name, _), each in zip(named, hashes, strict=True)))


def code_hash(parts: Iterable[nn.Module], augment: Any = None) -> str:
    """Return a hash of the code that computes features: source of the modules and of dinoseg, and library versions.

    Args:
        parts: modules of the model.
        augment: transform that makes the views; `data.augment` may name a custom one.
    """
    while isinstance(augment, partial):
        augment = augment.func
    kinds: set[Any] = {kind for part in parts for module in part.modules() for kind in type(module).__mro__[:-1]}
    kinds |= {augment} if inspect.isroutine(augment) else {*type(augment).__mro__[:-1]}
    files = {Path(file) for kind in kinds if (file := _source(kind)) is not None}
    package = Path(dinoseg.__file__).parent
    for source in _SOURCES:
        files |= {*(package / source).rglob("*.py")} if not source.endswith(".py") else {package / source}
    files = {path for path in files if path.exists()}  # an installation may lack packed data or videos
    contents = sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)
    return hash_of(*contents, *((library, _version(library)) for library in _LIBRARIES))


def image_hash(data: SegmentationData, index: int) -> str:
    """Return a hash of an image's bytes: of its file, or of its pixels if it has no file of its own."""
    if isinstance(data, PairDataset | Unmasked) and overrides_both(type(data), "image_hash", "__getitem__"):
        return data.image_hash(index)
    pixels = data[index]["image"].numpy()
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _tensor_hash(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(repr((tuple(plain.shape), plain.dtype)).encode())
    digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _source(kind: Any) -> str | None:
    try:
        return inspect.getsourcefile(kind)
    except (TypeError, OSError):  # built in, or defined interactively
        return None


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> dict[str, str]:
    if path.exists() and not path.is_file():
        raise forms.SchemaError("it is not a file")
    return forms.read_json(path, forms.table(forms.text))
