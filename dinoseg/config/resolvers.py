"""OmegaConf resolvers for config files, and configs with the run-specific ones already resolved."""

import math
import pkgutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from dinoseg.config.nodes import instantiate, not_set
from dinoseg.config.plain import to_container
from dinoseg.core.sizes import backbone_size
from dinoseg.utils.errors import KeyNotSet, UserError
from dinoseg.utils.wording import format_override, join_names

LENGTH = "dinoseg.len"
CLASS_FILE = "dinoseg.class_file"
CELLS = "dinoseg.cells"
NOW = "dinoseg.now"
EVALUATE = "dinoseg.evaluate"
_FILE_FLAG = "of_class_file"  # flag of lists and mappings from `classes.yaml`


class _Unmet(UserError, InterpolationResolutionError):
    """User error in a resolver, of a type that OmegaConf passes on without wrapping it."""

    _initialized = True


class _RootNotSet(KeyNotSet, _Unmet):
    """The same of a dataset without a folder."""


def register_resolvers() -> None:
    """Register the resolvers that config files may use, once; a program may have others, such as `len`.

    - `${dinoseg.len:${.classes}}` is the length of a list.
    - `${dinoseg.class_file:KEY}` is the value of a key in `classes.yaml`. With `${dinoseg.class_file:KEY,shapes}`, the
      annotation files replace an absent `classes.yaml`; `${dinoseg.class_file:classes,MODULE.FUNCTION}` names the
      function that reads the classes there, and with `things` the classes that have objects.
    - `${dinoseg.cells:${resolution},${backbone.patch_size}}` is the number of rows and columns of cells in a training
      crop; null if the patch size is null.
    - `${dinoseg.evaluate:${oc.select:data.fold}}` is `last` with a fold, else `best`: see `trainer.evaluate`.
    - `${dinoseg.now:%H-%M}` is the time, as that of `now` in Hydra.
    """
    if OmegaConf.has_resolver(LENGTH):
        return
    OmegaConf.register_new_resolver(LENGTH, _length)
    OmegaConf.register_new_resolver(CELLS, _cells, replace=True)
    OmegaConf.register_new_resolver(CLASS_FILE, _resolve_class_file, replace=True)
    OmegaConf.register_new_resolver(NOW, _time, replace=True, use_cache=True)
    OmegaConf.register_new_resolver(EVALUATE, _choose_weights, replace=True)


def _time(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _choose_weights(fold: int | None) -> str:
    # the best weights of a fold are chosen on the images that score it
    return "best" if fold is None else "last"


def _length(values: Any) -> int:
    if not isinstance(values, Sequence):
        raise _Unmet(
            f"data.classes={format_override(values)} is not a list. Write it in brackets: data.classes=[background, "
            "leaf]."
        )
    return len(values)


def _cells(resolution: DictConfig, patch_size: int | None) -> ListConfig | None:
    if patch_size is None:
        return None
    height, width = resolution.crop
    size = backbone_size((height, width), resolution.scale, resolution.longest)
    # a plain list could not be written instead of the interpolation, as `--resolve` does
    return ListConfig([math.ceil(side / patch_size) for side in size])


def _resolve_class_file(key: str, shapes: str = "", *, _root_: DictConfig) -> Any:
    """Return the value of `_from_class_file`, as a config node if it is a list or mapping, see `_cells`."""
    value = _from_class_file(key, shapes, _root_=_root_)
    return OmegaConf.create(value, flags={_FILE_FLAG: True}) if isinstance(value, list | dict) else value


def _is_of_file(value: Any) -> bool:
    """Return whether a value is a list from the class file, which `--resolve` has written into the config."""
    return OmegaConf.is_list(value) and bool(value._get_flag(_FILE_FLAG))


def _from_class_file(key: str, shapes: str = "", *, _root_: DictConfig) -> Any:
    """Return the value of a key in `classes.yaml` in `data.root`; if `data.classes` is given, the file is not read.

    Without the file, and with masks drawn from `shapes`, the labels of the shapes are the classes: for `classes`
    and for `things`, `shapes` may name the function that reads them.
    """
    from dinoseg.data.classes.file import CLASS_FILE, LABELS, NOT_DESCRIBED

    data = _root_.get("data")
    root = None if data is None or OmegaConf.is_missing(data, "root") else data.get("root")
    if data is None or not (OmegaConf.is_interpolation(data, "classes") or _is_of_file(data.get("classes"))):
        given = data is not None and shapes and key == "background" and data.unlabelled in data.classes
        return data.unlabelled if data is not None and given else NOT_DESCRIBED.get(key)
    path = Path(str(root or "")).expanduser() / CLASS_FILE
    if root is not None and (described := _read_class_file(path, data.ignore_index)) is not None:
        if shapes and described["format"] != LABELS:
            raise _Unmet(
                f"{path} describes mask files, but data={data.kind} rasterises masks from labelled shapes: write "
                "`masks: labels` in it."
            )
        return described[key]
    if shapes and root is not None and key == "background":
        return _ground(data)
    if "." in shapes and root is not None:
        return _names_of_labels(data, root, shapes)
    if key in NOT_DESCRIBED:
        return NOT_DESCRIBED[key]
    if shapes:
        raise _RootNotSet(str(not_set("data.root")), key="data.root")
    raise _Unmet(_missing_classes_message(data, None if root is None else path))


def _missing_classes_message(data: DictConfig, path: Path | None) -> str:
    """Return the error message on a dataset without classes, which names its missing root and folders, too.

    Args:
        data: the config group.
        path: of the class file; None without `data.root`.
    """
    from dinoseg.data.formats.folder import find_problem, split_folders

    reader: Any = data.get("reader")
    is_folder = OmegaConf.is_dict(reader) and reader.get("_target_") == "dinoseg.data.formats.folder.folder_dataset"
    try:
        layout: Any = instantiate(reader.layout) if is_folder else None
        partition: Any = instantiate(reader.partition) if is_folder else None
    except UserError as error:  # OmegaConf would wrap it
        return str(error)
    example = "`classes: [background, leaf]`"
    if path is None:
        holds = f" FOLDER holds {join_names(split_folders(layout))}." if layout else ""
        return (
            "data.root and data.classes are not set. Give both, with the class names in id order: data.root=FOLDER "
            f"data.classes=[background,leaf].{holds} FOLDER/classes.yaml can list the classes instead: {example}."
        )
    problem = find_problem(path.parent, layout, partition) if layout else ""
    return (
        f"{problem.rstrip('.')}{'. ' if problem else ''}data.classes is not set. Give the class names in id order: "
        f"data.classes=[background,leaf]. Or write them into {path}: {example}."
    )


def _ground(data: DictConfig) -> str | None:
    """Return the class of pixels that no shape covers; None if they are ignored."""
    return None if data.unlabelled == "ignore" else data.unlabelled


def _names_of_labels(data: DictConfig, root: str, function: str) -> list[str]:
    """Return the names that a function reads from annotation files; see `annotation_files.classes_of_labels`."""
    layout, shapes = data.reader.layout, data.reader.shapes
    try:
        return list(
            pkgutil.resolve_name(function)(
                Path(str(root)).expanduser(),
                kind=data.kind,
                layout={key: value for key, value in to_container(layout, resolve=True).items() if key != "_target_"},
                labels=[*(shapes.labels or ())],
                grouped=bool(shapes.get("grouped")),
                background=_ground(data),
            )
        )
    except UserError as error:
        raise _Unmet(str(error)) from None


def _read_class_file(path: Path, ignore_index: int) -> Mapping[str, Any] | None:
    """Return the content of a class file; None if there is no file."""
    from dinoseg.data.classes.file import read_class_file

    try:
        return read_class_file(path, ignore_index) if path.is_file() else None
    except UserError as error:
        raise _Unmet(str(error)) from None
