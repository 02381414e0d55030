"""Storage of choices: a cache file for the same command, and an editable recipe in YAML."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
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
_NAMES = rf"(?!(?:{'|'.join(BUILDS)})$).*"  # keys of a table, except those of `BUILDS`
_MOST_BYTES = 2**20  # of a file of choices, which takes a few thousand
_MOST_PIXELS = 2**30  # of the images in a batch, as in a checkpoint's config


def _name(*names: str) -> forms.Form:
    """Return the form of one of some names, or without names of any option of a config group."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or not (value in names if names else re.fullmatch(r"[a-z]\w*", value)):
            raise forms.Misshapen(f"{where:.99} is {value!r:.60}; it must be {' or '.join(names) or 'a name'}")

    return check


def _class_weights(value: Any, where: str) -> None:
    """Validate `loss.weights`: none, or a table from class name to weight without a `_target_`."""
    if value != "none":
        forms.table(forms.number(0, 2**20), _NAMES)(value, where)


_COUNT, _SIDE, _RATE = forms.whole(1, 2**40), forms.whole(1, 2**20), forms.number(0, 100)
_FORMS: Mapping[str, forms.Form] = {  # of all keys that may be chosen; a file with other keys is rejected
    **{"adapter": _name(), "head": _name("linear", "multiscale", "detail"), "loss": _name("ce_dice")},
    **{"adapter.blocks": forms.whole(1, 2**16), "head.init": _name("probe")},
    **{"backbone.checkpointing": forms.flag, "head.checkpointing": forms.flag},
    **{"loss.weights": _class_weights, "loss.criterion.factors.dice": forms.number(0, 2**20)},
    **{"data.augment.scale": forms.row(forms.number(0.01, 16), forms.number(0.01, 16))},
    **{"data.batch_size": forms.whole(1, 2**16), "data.views": forms.whole(1, 2**10)},
    **{"data.labelled": forms.number(1e-9, 1)},
    **{"resolution.crop": forms.row(_SIDE, _SIDE), "resolution.longest": _SIDE},
    **{"optim.optimizer.freeze_backbone_until": forms.number(0, 0.99)},
    **{"optim.optimizer.backbone_lr": _RATE, "optim.optimizer.head_lr": _RATE},
    **{"trainer.accumulate": forms.whole(1, 2**20), "trainer.max_minutes": forms.number(0, 2**40)},
    **dict.fromkeys(("trainer.steps", "trainer.val_every", "trainer.val_images"), _COUNT),
}


def _choices(value: Any, where: str) -> None:
    """Validate the overrides and reasons of all choices, and the size of the batch that they result in."""
    forms.listing(forms.record(words=forms.some_of(**_FORMS), reason=forms.text))(value, where)
    words = {key: each for row in value for key, each in row["words"].items()}
    pixels = math.prod(words.get("resolution.crop", ())) * words.get("data.batch_size", 1)
    if pixels > _MOST_PIXELS:
        raise forms.Misshapen(f"{where} makes batches of {pixels} pixels; the limit is {_MOST_PIXELS}")


_FORM = forms.record(about=forms.text, choices=_choices)


def read_choices(path: Path) -> tuple[str, list[RecipeChoice]] | None:
    """Return the stored summary and choices; None if the file is absent or damaged. Damage is logged."""
    found = finished(
        path,
        lambda path: forms.read_json(path, _FORM, most=_MOST_BYTES),
        damaged="The stored choices in %s are damaged (%s): choosing again.",
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
