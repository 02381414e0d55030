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
USE = "inference"  # inference strategy: a run that validates with windows is evaluated with them
# a group of an extension, named here: read from a file, the list would let the file choose any group
FOLLOWING = "slots"  # the same for models without classes: how their segments are tracked
USES = (USE, FOLLOWING)
TEACHER = "teacher"  # the run that teaches a student
INITIAL = "init"  # the run whose weights initialise a new one
METRIC = "metric"  # further metrics of validations and evaluations
OPTIONAL = (*USES, TEACHER, INITIAL, METRIC)  # root keys that a checkpoint omits if they are not set
SAVED = ("seed", *GROUPS, *OPTIONAL)  # root keys of a config that a checkpoint saves
DESCRIBED_GROUPS = ("hparam", "data", *MODEL)
_LARGEST = 2**20  # characters of a description
_DEEPEST = 32
PRECISION = "precision"  # key of an explicit `engine.precision=fp32`, which later runs of the model keep
THRESHOLDS = "thresholds"  # key of those that a training chose for these weights by task.threshold=auto
IDLE = "idle"  # key in `last`: number of parameters without optimizer state
_COUNT = forms.whole()
_COUNTS = ("step", "best_step", "best_infinite", "stale")  # in the progress


def read_description(text: str | None, where: str) -> dict[str, Any]:
    """Return the description in a safetensors file's header; `where` starts messages.

    Raises:
        UserError: there is none, it has another format, or an entry does not have the form that dinoseg writes.
    """
    if text is None:
        raise UserError(
            f"{where}: a safetensors file, but not a checkpoint of dinoseg. {_OTHER} For backbone weights, set "
            "backbone.weights."
        )
    if len(text) > _LARGEST:
        raise UserError(f"{where}: its description has {len(text)} characters, above the limit of {_LARGEST}. {_OTHER}")
    try:
        info = json.loads(text)  # not forms.parse_json: a config may hold .inf, which recipes can set
        _check_description(info)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its description is invalid ({error}). {_OTHER}") from error
    return info


def locate_weights(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config in which relative paths of weights are whole ones, if they lead to something in a folder.

    Args:
        config: of a checkpoint; other weights, such as hub ids, do not change.
        folder: where the run was started; of a one-file model, its own folder.
    """
    parts = {part: config[part] for part in ("backbone", "head")}
    return {**config, **{part: {**node, **_whole_path(node.get("weights"), folder)} for part, node in parts.items()}}


def resolve_score(config: Mapping[str, Any]) -> str:
    """Return `trainer.score` of a saved config, in which none or an interpolation means the default."""
    default = (config.get("task") or {}).get("score", "miou")
    score: str = config.get("trainer", {}).get("score", default)
    return default if score.startswith("$") else score


def resolve_evaluate(evaluate: str | None, fold: int | None) -> str:
    """Return the weights that a run evaluates, `best` or `last`.

    Args:
        evaluate: `trainer.evaluate` of a saved config; None or an interpolation means the default of `cfg/trainer`.
        fold: `data.fold` of that config.
    """
    if evaluate in ("best", "last"):
        return evaluate
    return "best" if fold is None else "last"


def changed_prediction(info: Mapping[str, Any], other: Mapping[str, Any], score: str | None) -> dict[str, Any]:
    """Return the settings, besides model, metric and data, that change a validation's score against `other`."""
    here, there = _prediction(info, score), _prediction(other, score)
    return {key: here.get(key) for key in {**there, **here} if here.get(key) != there.get(key)}


def _prediction(info: Mapping[str, Any], score: str | None) -> dict[str, Any]:
    config, choices = info.get("config", {}), info.get("choices", {})
    found = {"data.background": config["data"].get("background")} if score == "miou_no_background" else {}
    # the loss has no thresholds, and needs no segments that are tracked
    for group in (USE,) if score == "loss" else (*USES, "task"):
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


def _check_description(info: Any) -> None:
    forms.max_depth(_DEEPEST)(info, "it")
    forms.object_with(format=_COUNT)(info, "it")
    if info["format"] != FORMAT:
        raise forms.SchemaError(
            f"it has format {info['format']}, and this version of dinoseg reads format {FORMAT}: use that of the file"
        )
    forms.object_with(**_ENTRIES)({IDLE: 0, PRECISION: None, THRESHOLDS: None, **info}, "it")
    forms.list_of(_COLOUR, len(info["classes"]))(info["palette"], "it.palette")


def _name(value: Any, where: str) -> None:
    """Check a name that is printed, or goes into a config, where an interpolation would be resolved."""
    is_name = isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()
    if not is_name or "${" in value or value == "???":
        raise forms.SchemaError(
            f"{where} is {format_value(value, 60)}; it must be a name of 1 to {LONGEST_NAME} characters"
        )


def _options(value: Any, where: str) -> None:
    """Check an option of each group, or several of a group."""
    forms.object_with(**dict.fromkeys(DESCRIBED_GROUPS, _name))(value, where)
    for group, option in value.items():
        _name(group, where)
        options = option if isinstance(option, list) else [option]
        forms.list_of(_name)(options, f"{where}.{group}")


def _precision(value: Any, where: str) -> None:
    if value not in (None, "fp32"):
        raise forms.SchemaError(f"{where} is {format_value(value, 60)}; it must be fp32")


_COLOUR = forms.list_of(forms.whole(0, 255), 3)
_ENTRIES: Mapping[str, forms.Form] = {
    "progress": forms.some_of(
        **dict.fromkeys(_COUNTS, _COUNT), best=forms.maybe(forms.number()), validation_pending=forms.flag
    ),
    "frozen": forms.table(forms.text),
    "config": forms.object_with(seed=_COUNT, **dict.fromkeys(GROUPS, forms.object_with())),
    "choices": _options,
    "targets": forms.table(forms.text),
    "folder": forms.text,
    "classes": forms.list_of(_name),
    "palette": forms.list_of(_COLOUR),
    "ignore_index": forms.whole(0, 255),
    PRECISION: _precision,
    THRESHOLDS: forms.maybe(forms.list_of(forms.number(0, 1))),
    IDLE: _COUNT,
}
_OTHER = "Choose another checkpoint."
