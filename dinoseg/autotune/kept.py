"""Choices as files: kept for the same command, and written as a recipe that can be edited."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dinoseg.autotune.rules import Choice
from dinoseg.config.plain import BUILDS
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_text
from dinoseg.utils.units import finished
from dinoseg.utils.wording import one_line, typed

NAME = "chosen"  # of the recipe
GROUPS = ("adapter", "head", "loss")  # of which an option is chosen
_KEYS = (  # what is ever chosen: a file that says more is none of ours
    *GROUPS,
    *("adapter.blocks", "backbone.checkpointing", "head.checkpointing"),
    *("loss.weights", "loss.criterion.factors.dice"),
    *("data.augment.scale", "data.batch_size", "data.views", "resolution.crop", "resolution.longest"),
    *("optim.optimizer.backbone_begin", "optim.optimizer.backbone_lr", "optim.optimizer.head_lr"),
    *("trainer.accumulate", "trainer.max_minutes", "trainer.steps", "trainer.val_every", "trainer.val_images"),
    *("data.labelled", "head.init"),
)

_NAMES = rf"(?!(?:{'|'.join(BUILDS)})$).*"  # of a table: nothing that is built


def _value(value: Any, where: str) -> None:
    """Form of what a key may be set to: a number, several, in a row or by name, yes or no, or a name; nothing built."""
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
    """Form of a choice's words: of a group the name of an option, of other keys what they may be set to."""
    _ANY_WORDS(value, where)
    for group in value.keys() & set(GROUPS):
        forms.text(value[group], f"{where}.{group}")


_FORM = forms.record(about=forms.text, choices=forms.listing(forms.record(words=_words, reason=forms.text)))


def read_choices(path: Path) -> tuple[str, list[Choice]] | None:
    """Return what was chosen, and for what; None where that file is not there or is damaged, which is told."""
    found = finished(
        path,
        lambda path: forms.read_json(path, _FORM),
        damaged="The kept choices in %s are damaged (%s): choosing anew.",
    )
    if found is None:
        return None
    return found["about"], [Choice(row["words"], row["reason"]) for row in found["choices"]]


def write_choices(path: Path, about: str, choices: Iterable[Choice]) -> None:
    """Keep what was chosen, and for what."""
    rows = [{"words": dict(choice.words), "reason": choice.reason} for choice in choices]
    text = json.dumps({"about": about, "choices": rows})
    forms.parse_json(text, _FORM)  # or it would be chosen anew each time
    write_text(path, text)


def told(choices: Iterable[Choice]) -> list[str]:
    """Return a line for each choice: what is set, and why."""
    rows = [(" ".join(f"{key}={_typed(value)}" for key, value in each.words.items()), each.reason) for each in choices]
    return [one_line(f"  {words}: {reason}.") for words, reason in rows]


def _typed(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {number:g}" for name, number in value.items()) + "}"
    return typed(value)


def recipe_text(about: str, choices: Sequence[Choice]) -> str:
    """Return choices as a recipe: a config file of the group hparam."""
    lines = ["# @package _global_", _comment(f"Chosen by hparam=auto: {about}.")]
    keys: dict[str, Any] = {}
    groups: dict[str, Any] = {}  # of two for one, the later: memory may ask for another adapter than time
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
    # JSON is YAML, and a number such as 1e-05 is one in it to OmegaConf
    lines += [f"{key}: {json.dumps(node, ensure_ascii=False)}" for key, node in keys.items()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Return text as one line of YAML that says nothing: a class may be called what would end a comment."""
    return "# " + "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
