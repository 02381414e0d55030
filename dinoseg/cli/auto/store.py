"""Storage of choices: a cache file for the same command, and an editable recipe in YAML."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dinoseg.autotune.rules import RecipeChoice
from dinoseg.config.plain import BUILDS
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_text
from dinoseg.utils.units import finished
from dinoseg.utils.wording import one_line, typed

NAME = "chosen"  # of the written recipe
GROUPS = ("adapter", "head", "loss")  # config groups whose option is chosen
_KEYS = (  # all keys that may be chosen; a file with other keys is rejected
    *GROUPS,
    *("adapter.blocks", "backbone.checkpointing", "head.checkpointing"),
    *("loss.weights", "loss.criterion.factors.dice"),
    *("data.augment.scale", "data.batch_size", "data.views", "resolution.crop", "resolution.longest"),
    *("optim.optimizer.backbone_begin", "optim.optimizer.backbone_lr", "optim.optimizer.head_lr"),
    *("trainer.accumulate", "trainer.max_minutes", "trainer.steps", "trainer.val_every", "trainer.val_images"),
    *("data.labelled", "head.init"),
)

_NAMES = rf"(?!(?:{'|'.join(BUILDS)})$).*"  # keys of a table, except those of `BUILDS`


def _value(value: Any, where: str) -> None:
    """Validate a key's value: a bool, a name, a number, or a list or table of numbers; no `_target_`."""
    if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"[a-z]\w*", value)):
        return
    number = forms.number()
    if isinstance(value, list):
        forms.listing(number)(value, where)
    elif isinstance(value, dict):
        forms.table(number, _NAMES)(value, where)
    else:
        number(value, where)


_ANY_WORDS = forms.table(_value, "|".join(map(re.escape, _KEYS)))


def _words(value: Any, where: str) -> None:
    """Validate the overrides of a choice: option names for groups, plain values for other keys."""
    _ANY_WORDS(value, where)
    for group in value.keys() & set(GROUPS):
        forms.text(value[group], f"{where}.{group}")


_FORM = forms.record(about=forms.text, choices=forms.listing(forms.record(words=_words, reason=forms.text)))


def read_choices(path: Path) -> tuple[str, list[RecipeChoice]] | None:
    """Return the stored summary and choices; None if the file is absent or damaged. Damage is logged."""
    found = finished(
        path,
        lambda path: forms.read_json(path, _FORM),
        damaged="The kept choices in %s are damaged (%s): choosing anew.",
    )
    if found is None:
        return None
    return found["about"], [RecipeChoice(row["words"], row["reason"]) for row in found["choices"]]


def write_choices(path: Path, about: str, choices: Iterable[RecipeChoice]) -> None:
    """Store the summary and the choices."""
    rows = [{"words": dict(choice.words), "reason": choice.reason} for choice in choices]
    text = json.dumps({"about": about, "choices": rows})
    forms.parse_json(text, _FORM)  # a file that fails validation would be chosen again each time
    write_text(path, text)


def choice_lines(choices: Iterable[RecipeChoice]) -> list[str]:
    """Return one line per choice, with overrides and reason."""
    rows = [(" ".join(f"{key}={_typed(value)}" for key, value in each.words.items()), each.reason) for each in choices]
    return [one_line(f"  {words}: {reason}.") for words, reason in rows]


def _typed(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {number:g}" for name, number in value.items()) + "}"
    return typed(value)


def recipe_text(about: str, choices: Sequence[RecipeChoice]) -> str:
    """Return choices as a recipe: a config file of the group hparam."""
    lines = ["# @package _global_", _comment(f"Chosen by hparam=auto: {about}.")]
    keys: dict[str, Any] = {}
    groups: dict[str, Any] = {}  # the later of two choices wins: memory may need another adapter than time does
    for choice in choices:
        lines.append(_comment(f"{' '.join(choice.words)}: {choice.reason}"))
        groups |= {key: value for key, value in choice.words.items() if key in GROUPS}
        for key, value in choice.words.items():
            if key not in GROUPS:
                *path, last = key.split(".")
                node = keys
                for part in path:
                    node = node.setdefault(part, {})
                node[last] = value
    lines += ["defaults:"] if groups else []
    lines += [f"  - override /{group}: {option}" for group, option in groups.items()]
    # JSON is valid YAML, in which OmegaConf parses numbers such as 1e-05 as such
    lines += [f"{key}: {json.dumps(node, ensure_ascii=False)}" for key, node in keys.items()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Return text as a one-line YAML comment; unprintable characters, which could end it, are escaped."""
    return "# " + "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
