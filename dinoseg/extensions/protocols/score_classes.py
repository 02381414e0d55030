"""Classes and groups for mode=score: from the data on the command line, or from a record stored with predictions."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.job import mask_keys
from dinoseg.config.nodes import check_arguments, instantiate
from dinoseg.data.classes.file import CLASS_FILE
from dinoseg.data.classes.labels import Labels
from dinoseg.data.splits import find_groups, group_names
from dinoseg.extensions.protocols.contract import Cases, ScoreProtocol
from dinoseg.extensions.protocols.davis_layout import tracked_sequence
from dinoseg.inference.class_record import CLASS_RECORD, read_class_record, references
from dinoseg.runs.folder import find_typed_keys
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names

GROUP = "data.group"
_MASKS = "data.reader.masks."
_READ = (GROUP, "data.on_error")
_CLASS_KEYS = ("data.classes", "data.palette", "data.ignore_index", "data.root", "data.reader.masks")
logger = logging.getLogger(__name__)


def score_protocol(cfg: DictConfig, predictions: Sequence[Path], out_dir: Path) -> ScoreProtocol:
    """Return the protocol, with class names and reference encoding filled in if it accepts any classes.

    Both come from `data=` if it names classes, else from `classes.json` next to the predictions. In the second case,
    keys of `data.reader.masks` on the command line take precedence. A protocol whose own keys define the reference
    encoding uses these keys.

    Raises:
        UserError: two folders of predictions, or they and the data, have different classes, or predictions are of
            another task than the protocol.
    """
    if "classes" not in cfg.protocol:
        return instantiate(cfg.protocol)
    make = instantiate(cfg.protocol, overrides={"_partial_": True})
    has_layers = make.func.has_layers
    found = {folder: read_class_record(folder, has_layers=has_layers) for folder in predictions}
    records = {folder: record for folder, record in found.items() if record is not None}
    if cfg.protocol.classes is not None:
        return make()
    data, rules = cfg.data, cfg.protocol
    known = {str(folder / CLASS_RECORD): record.labels for folder, record in records.items()}
    if _has_classes(data):
        labels, masks = Labels.of(data.classes, data.palette, data.ignore_index), mask_keys(data)
        _refuse_others({f"data={cfg.choices.data}": labels, **known})
    elif records:
        _refuse_others(known)
        record = next(iter(records.values()))
        labels = record.labels
        words = find_typed_keys(out_dir)
        if "data.ignore_index" in words:
            labels = Labels.of(labels.classes, labels.palette, data.ignore_index)
        typed = {word.removeprefix(_MASKS).split(".")[0] for word in words if word.startswith(_MASKS)}
        given = mask_keys(data) if typed else {}
        masks = {**record.masks, **{key: given[key] for key in typed}}
    elif rules.get("num_classes", 0) is None and not rules.binary:
        tracked = any(tracked_sequence(folder) is not None for folder in predictions)
        raise UserError(
            f"protocol.num_classes=null: protocol={cfg.choices.protocol} needs the number of classes. Set their "
            "names, data.classes=[background,leaf], or protocol.num_classes=19, or protocol.binary=true for "
            "masks of 0 and 255; results of mode=predict store it."
            + " Score masks of mode=track by protocol=davis2016, or several objects by davis2017."
            * tracked
        )
    else:
        return make()
    runtime_arguments: dict[str, Any] = {"classes": list(labels.classes)}
    if not (rules.binary or rules.get("reduce_zero_label") or rules.ignore_index != 255):
        check_arguments("dinoseg.data.classes.masks.Masks", masks)
        read = references(labels, masks, has_layers=has_layers)
        runtime_arguments |= {"references": read, "ignore_index": labels.ignore_index}
    return make(**runtime_arguments)


def warn_of_unread_data(out_dir: Path, *, reads_classes: bool) -> None:
    """Warn once of typed keys of `data` without effect; `reads_classes`: whether the protocol takes any classes."""
    read = (*_READ, *(_CLASS_KEYS if reads_classes else ()))
    below = tuple(f"{key}." for key in read)
    typed = sorted(key for key in find_typed_keys(out_dir) if key.startswith(("data.", "data/")))
    unread = [key for key in typed if key not in read and not key.startswith(below)]
    if unread:
        unused, others = join_names(unread, len(unread)), join_names(read, len(read))
        logger.warning("No effect here: %s. Of data, this command reads only %s.", unused, others)


def find_score_groups(
    pattern: str | None, protocol: ScoreProtocol, predictions: Sequence[Path], out_dir: Path
) -> Callable[[Cases], dict[str, str]]:
    """Return a function that maps cases to their groups for the intervals; it adds a note if a pattern does not fit.

    Groups come from the first of these that exists: a typed `data.group`, that of `data=`, what a run of mode=predict
    or mode=track stored, the protocol. The function raises a UserError if the typed `data.group` does not match a name.

    Args:
        pattern: `data.group` of the config, typed or that of `data=`.
        protocol: the protocol.
        predictions: folders of predictions.
        out_dir: the run folder.

    Raises:
        UserError: a record is damaged or of another task.
    """
    is_typed = GROUP in find_typed_keys(out_dir)
    stored: dict[str, str] = {}
    if pattern is None and not is_typed:
        stored = _stored_groups(predictions, has_layers=protocol.has_layers)
        pattern = protocol.group

    def find(cases: Cases) -> dict[str, str]:
        names = [case.name for case in cases.cases]
        if is_typed:
            return group_names(pattern, names, GROUP)
        if not stored.keys().isdisjoint(names):
            return stored
        groups, notes = find_groups(pattern, names, GROUP)
        cases.notes += notes
        return groups

    return find


def _stored_groups(predictions: Sequence[Path], *, has_layers: bool) -> dict[str, str]:
    """Return the groups that runs stored, by image name; those of the first folder take precedence."""
    merged: dict[str, str] = {}
    for folder in predictions:
        video = tracked_sequence(folder)
        if video is not None:  # all frames are of one video
            groups = {path.stem: video for path in folder.glob("*.png")}
        else:
            record = read_class_record(folder, has_layers=has_layers)
            groups = {} if record is None else record.groups
        if any(groups[name] != merged[name] for name in groups.keys() & merged.keys()):
            logger.warning(
                "The predictions group images differently (%s): intervals use the groups of the first. Set %s to "
                "choose others.",
                CLASS_RECORD,
                GROUP,
            )
        merged = {**groups, **merged}
    return merged


def _has_classes(data: DictConfig) -> bool:
    """Return whether a data node names its classes, without reading a missing class file."""
    if not OmegaConf.is_interpolation(data, "classes"):
        return not OmegaConf.is_missing(data, "classes")
    root = None if OmegaConf.is_missing(data, "root") else data.root
    return root is not None and (Path(str(root)).expanduser() / CLASS_FILE).is_file()


def _refuse_others(known: Mapping[str, Labels]) -> None:
    (first, labels), *others = known.items()
    for where, other in others:
        if other.classes != labels.classes:
            raise UserError(
                f"{first} has the classes {', '.join(labels.classes)}, and {where} has {', '.join(other.classes)}: "
                "their ids do not mean the same. Score predictions of the same classes in the same order."
            )
