"""Description of a checkpoint, validated when read: each entry has its type, limited depth and limited size."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoseg.data.classes.labels import LONGEST_NAME
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

FORMAT = 2
MODEL = ("backbone", "adapter", "head", "loss", "optim", "trainer")  # config groups that a checkpoint fixes
GROUPS = ("resolution", "data", "task", *MODEL)
DESCRIBED_GROUPS = ("hparam", "data", *MODEL)
_LARGEST = 2**20  # characters of a description
_DEEPEST = 32
_LONGEST_TARGET = 1000  # characters of a dotted name
_MAX_OPTIONS = 100  # of one group
PRECISION = "precision"  # key of an explicit `engine.precision=fp32`, which later runs of the model keep
IDLE = "idle"  # key in `last`: number of parameters without optimizer state
_COUNT = forms.whole()
_COUNTS = ("step", "best_step", "best_infinite", "stale")  # in the progress


def read_description(text: str | None, where: str) -> dict[str, Any]:
    """Return the description in a safetensors file's header; `where` starts messages.

    Raises:
        UserError: there is none, it has another format, or it has an entry that dinoseg does not write.
    """
    if text is not None and len(text) > _LARGEST:
        raise UserError(f"{where}: its description has {len(text)} characters, above the limit of {_LARGEST}. {_OTHER}")
    try:
        info = json.loads(text or "null")  # not forms.parse_json: a config may hold .inf, which recipes can set
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its description cannot be read ({type(error).__name__}). {_OTHER}") from error
    if not isinstance(info, dict):
        raise UserError(
            f"{where}: a safetensors file, but not a checkpoint of dinoseg. {_OTHER} For backbone weights, set "
            "backbone.weights."
        )
    absent = [key for key in RULES if key not in info]
    if absent:
        raise UserError(f"{where}: its description lacks {', '.join(absent)}. {_OTHER}")
    if not forms.fits(info, forms.max_depth(_DEEPEST)):
        raise UserError(f"{where}: its description is nested deeper than {_DEEPEST} levels. {_OTHER}")
    for key, (form, rule) in RULES.items():
        if key == "format" and forms.fits(info[key], _COUNT) and info[key] != FORMAT:
            remedy = (
                "Update dinoseg." if info[key] > FORMAT else "Use the version of dinoseg that wrote it, or train again."
            )
            raise UserError(
                f"{where}: written in format {info[key]}; this version of dinoseg reads format {FORMAT}. {remedy}"
            )
        if not forms.fits(info[key], form):
            raise UserError(f"{where}: its {key} is {format_value(info[key])}; it must be {rule}. {_OTHER}")
    if info.get(PRECISION) not in (None, "fp32"):
        raise UserError(f"{where}: its precision is {format_value(info[PRECISION])}; it must be fp32. {_OTHER}")
    if not forms.fits(info.get(IDLE, 0), _COUNT):
        raise UserError(f"{where}: its {IDLE} is {format_value(info[IDLE])}; it must be a whole number. {_OTHER}")
    if len(info["palette"]) != len(info["classes"]):
        raise UserError(
            f"{where}: it has {len(info['palette'])} colours for {len(info['classes'])} classes; it must have one for "
            f"each. {_OTHER}"
        )
    return info


def locate_weights(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config in which relative paths of weights are whole ones, if they lead to something in a folder.

    Args:
        config: of a checkpoint; other weights, such as hub ids, do not change.
        folder: where the run was started; of a one-file model, its own folder.
    """
    parts = {part: config[part] for part in ("backbone", "head")}
    return {**config, **{part: {**node, **_whole_path(node.get("weights"), folder)} for part, node in parts.items()}}


def changed_prediction(info: Mapping[str, Any], other: Mapping[str, Any], score: str | None) -> dict[str, Any]:
    """Return the settings, besides model, metric and data, that change a validation's score against `other`."""
    here, there = _prediction(info, score), _prediction(other, score)
    return {key: here.get(key) for key in {**there, **here} if here.get(key) != there.get(key)}


def _prediction(info: Mapping[str, Any], score: str | None) -> dict[str, Any]:
    config, choices = info.get("config", {}), info.get("choices", {})
    found = {"data.background": config["data"].get("background")} if score == "miou_no_background" else {}
    # the loss has no thresholds, and needs no slots that are followed
    for group in ("inference",) if score == "loss" else ("inference", "slots", "task"):
        found[group] = choices.get(group)
        found |= {f"{group}.{key}": value for key, value in config.get(group, {}).items() if key != "batch_size"}
    return found


def _whole_path(weights: Any, folder: Path) -> dict[str, str]:
    if not isinstance(weights, str) or weights in ("random", "timm"):
        return {}
    try:
        path = folder / Path(weights).expanduser()
        return {"weights": str(path.absolute())} if path.exists() else {}
    except (OSError, RuntimeError, ValueError):  # name too long, home of an unknown user, invalid characters
        return {}


def _name(value: Any, where: str) -> None:
    if not (isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()):
        raise forms.SchemaError(f"{where} is not a name")


def _names(value: Any, where: str) -> None:
    forms.list_of(_name)(value, where)
    if not 1 <= len(value) <= 255:
        raise forms.SchemaError(f"{where} are missing, or too many")


def _names_by_name(value: Any, where: str) -> None:
    forms.table(_name)(value, where)
    for name in value:
        _name(name, where)


def _choices(value: Any, where: str) -> None:
    """Validate an option name for each group; interpolations are refused, since the names go into the config."""
    forms.table(_option)(value, where)
    for group in value:
        _name(group, where)
    forms.object_with(**dict.fromkeys(DESCRIBED_GROUPS, _name))(value, where)


def _option(value: Any, where: str) -> None:
    """Validate the name of an option, or of several."""
    names = value if isinstance(value, list) else [value]
    if len(names) > _MAX_OPTIONS:
        raise forms.SchemaError(f"{where} has more than {_MAX_OPTIONS} options")
    for name in names:
        _name(name, where)
        if "${" in name or name == "???":
            raise forms.SchemaError(f"{where} holds an interpolation")


def _target(value: Any, where: str) -> None:
    if not (isinstance(value, str) and len(value) <= _LONGEST_TARGET):
        raise forms.SchemaError(f"{where} is not a name of a class")


def _folder(value: Any, where: str) -> None:
    if not (isinstance(value, str) and 0 < len(value) <= 4096 and "\0" not in value):
        raise forms.SchemaError(f"{where} is not a folder")


_FINITE = forms.number()
RULES: Mapping[str, tuple[forms.Form, str]] = {  # key to the form of its value, and a description of that form
    "format": (_COUNT, "a whole number"),
    "progress": (
        forms.some_of(**dict.fromkeys(_COUNTS, _COUNT), best=forms.maybe(_FINITE), validation_pending=forms.flag),
        f"finite numbers of {', '.join(_COUNTS)} and best, without other keys",
    ),
    "frozen": (_names_by_name, "a hash for backbone and for head"),
    "config": (
        forms.object_with(seed=_COUNT, **dict.fromkeys(GROUPS, forms.object_with())),
        f"a seed and the groups {', '.join(GROUPS)}, each with its keys",
    ),
    "choices": (_choices, f"an option of each of {', '.join(DESCRIBED_GROUPS)}"),
    "targets": (forms.table(_target), "a name of a class for each place"),
    "folder": (_folder, "a folder"),
    "classes": (_names, f"1 to 255 names of at most {LONGEST_NAME} printable characters"),
    "palette": (
        forms.list_of(forms.list_of(forms.whole(0, 255), 3)),
        "colours, each of three whole numbers from 0 to 255",
    ),
    "ignore_index": (forms.whole(0, 255), "a whole number from 0 to 255"),
}
_OTHER = "Choose another checkpoint."
