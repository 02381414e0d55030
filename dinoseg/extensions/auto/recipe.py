"""`hparam=auto`: choices for a command line, made once and stored, so that the same command gets the same choices."""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dinoseg import __version__
from dinoseg.config.composition import SHIPPED, compose
from dinoseg.config.job import read_words, search_path_override
from dinoseg.config.plain import BUILDS, to_container
from dinoseg.core.shapes import SegmentationData
from dinoseg.core.task import ObjectTask
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.splits import evenly_spaced_subset
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import LENGTHS, config_description, recipe_of
from dinoseg.extensions.auto.choose import Budget, choose
from dinoseg.extensions.auto.rules import RecipeChoice
from dinoseg.extensions.auto.training_parts import check_trainer
from dinoseg.methods.images import SAMPLING
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils import forms
from dinoseg.utils.atomic import create_cache_dir, write_text
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError
from dinoseg.utils.locks import hold_lock
from dinoseg.utils.units import read_valid_note
from dinoseg.utils.wording import format_override, one_line, printable

AUTO = "auto"  # name of the recipe that is chosen automatically
NAME = "chosen"  # of the written recipe
GROUPS = ("adapter", "head", "loss", "task")  # config groups whose option is chosen
# overrides that do not affect the choices
_RUN_KEYS = ("seed", "resume", "budget", "logger", "metric", "hydra", "mode", "hparam")
_IMPLIED_BY = {  # from chosen keys to other keys that replace them if typed
    "loss.weights": ("loss",),
    "loss.criterion.factors.dice": ("loss", "loss.criterion", "loss.criterion.factors"),
    "trainer.steps": ("trainer.epochs",),
    "trainer.max_minutes": ("trainer.steps", "trainer.epochs"),
    "trainer.val_every": ("trainer.steps", "trainer.epochs"),
}
_KEYS = (  # that are chosen
    *GROUPS,
    *("head.init", "loss.weights", "loss.criterion.factors.dice"),
    *("data.augment.scale", "data.batch_size", "data.labelled", "data.views", "resolution.crop", "resolution.longest"),
    "optim.optimizer.freeze_backbone_until",
    *("trainer.steps", "trainer.max_minutes", "trainer.val_every", "trainer.val_images"),
)
_CLASS_NAME = rf"(?!(?:{'|'.join(BUILDS)})$).*"


@dataclass(frozen=True)
class ChosenRecipe:
    """The recipe chosen for a command line.

    Attributes:
        cfg: the whole config with the choices.
        text: content of the recipe's file.
        words: overrides of a command line that trains with that file.
    """

    cfg: DictConfig
    text: str
    words: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write the recipe where `--config-dir FOLDER hparam=chosen` finds it, and print the command that uses it."""
        path = folder / "hparam" / f"{NAME}.yaml"
        write_text(path, self.text)
        folders = [f"file://{Path(each).absolute()}" for each in self.cfg.config_dirs]
        search_path = [search_path_override(folders)] if folders else []
        # Hydra reads the last --config-dir
        words = [*self.words, *search_path, f"hparam={NAME}", "--config-dir", str(folder)]
        command = shlex.join(["python", "-m", "dinoseg", *words])
        print(printable(f"\nrecipe:       {path}\n              {command}\n"))


def choose_recipe(cfg: DictConfig, words: Sequence[str]) -> ChosenRecipe:
    """Return the recipe for a command line: from stored choices, or from new ones.

    Args:
        cfg: composed from the command line, without choices.
        words: of the command line.

    Raises:
        UserError: a value is out of range, or nothing fits.
    """
    builder = Builder(cfg)
    _check(builder)
    given = typed_keys(words)
    others = [*_without(words, "budget"), f"+budget.minutes={cfg.budget.minutes}"]  # which the chosen recipe lacks

    def compose_with(choices: Sequence[RecipeChoice]) -> DictConfig:
        return compose_recipe(others, cfg.config_dirs, recipe_text("trying", drop_typed(choices, given)[0]))

    train, task = _open_train(builder, compose_with)
    if task:
        builder = Builder(compose_with(task))
    val = builder.dataset("val")
    path = _path(builder, given, (train, val))
    source = f"reused from {path} (remove it to choose again)"
    create_cache_dir(path.parent)
    # concurrent commands, such as the jobs of a sweep over seeds, wait and reuse the choices
    with hold_lock(path.with_suffix(".lock")):
        stored = read_choices(path)
        if stored is None:
            data = train, evenly_spaced_subset(val, cfg.trainer.get("val_images"))
            budget = Budget(cfg.budget.minutes)
            engine = builder.engine(devices=1)
            about, others_chosen = choose(lambda found: compose_with([*task, *found]), data, engine, given, budget)
            stored = about, [*task, *others_chosen]
            source = "chosen now"
            try:
                write_choices(path, *stored)
            except OSError as error:  # no log is open yet
                message = f"warning: cannot write {path} ({error}): the next run chooses again."
                print(printable(message), file=sys.stderr)
    about, choices = stored
    choices, taken = drop_typed(choices, given)  # the file stores all: other keys may be typed next
    about += f"; set on the command line: {', '.join(taken)}" if taken else ""
    print(printable(f"hparam=auto: {about}; {source}:\n\n" + "\n".join(choice_lines(choices))))
    text = recipe_text(about, choices)
    return ChosenRecipe(
        compose_recipe(others, cfg.config_dirs, text), text, _without(words, "budget", "hparam", "resume")
    )


def _open_train(
    builder: Builder, compose_with: Callable[[Sequence[RecipeChoice]], DictConfig]
) -> tuple[SegmentationData, list[RecipeChoice]]:
    """Return the training images, and task=multilabel if their masks can be read as those of one class each alone.

    Raises:
        UserError: they cannot be read in any way.
    """
    try:
        train = builder.dataset("train", reduced=True)
        train[0]
    except UserError as error:
        task = RecipeChoice({"task": "multilabel"}, "each class has masks of its own")
        try:
            train = Builder(compose_with([task])).dataset("train", reduced=True)
            train[0]
        except UserError:
            raise error from None
        return train, [task]
    return train, []


def _without(words: Sequence[str], *roots: str) -> list[str]:
    """Return the words of a command line that set no key below some root keys."""
    return [word for word in words if _root(word.lstrip("+~").partition("=")[0]) not in roots]


def _check(builder: Builder) -> None:
    """Refuse what hparam=auto cannot choose for, and values that training would refuse only later."""
    builder.arguments(Budget, {"minutes": "budget.minutes"})
    if isinstance(builder.task, ObjectTask):
        raise UserError(
            f"hparam=auto chooses for classes of pixels, not for task={builder.options['task']}. Choose a recipe of "
            "objects: hparam=instance or hparam=panoptic."
        )
    if builder.make_training().on_clips or "unlabelled" in builder.value("trainer"):
        raise UserError(
            f"hparam=auto chooses for images and their masks, not for trainer={builder.options['trainer']}. Choose a "
            "recipe: mode=help lists them."
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "hparam=auto chooses before the ranks start, not in ranks of torchrun or Slurm. Choose with mode=plan in "
            "one process and train with the command that it prints, or let engine.devices=N start the ranks."
        )
    check_trainer(builder)
    builder.loop_settings(samples=1)
    builder.arguments(ImageDataModule, SAMPLING)
    builder.part("data.augment")  # refuses an invalid crop
    builder.arguments(evenly_spaced_subset, {"count": "trainer.val_images"})


def _path(builder: Builder, given: frozenset[str], data: Sequence[SegmentationData]) -> Path:
    """Return the file that stores the choices, named by a hash of their inputs.

    The machine's current speed is not part of the hash.
    """
    depends = {
        "version": __version__,
        "recipe": {key: value for key, value in recipe_of(config_description(builder)).items() if key != "seed"},
        "given": sorted(key for key in given if _root(key) not in _RUN_KEYS and key.rpartition(".")[2] not in LENGTHS),
        "minutes": float(builder.value("budget.minutes")),
        "data": [each.fingerprint() if isinstance(each, PairDataset) else list(each.names) for each in data],
        "engine": {
            key: to_container(builder.value("engine"))[key]
            for key in ("device", "precision", "cache", "devices", "sharding")
        },
        "machine": (platform.node(), count_cores()),
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
    return builder.cache_dir / f"choices_{key[:16]}.json"


def _root(key: str) -> str:
    return key.partition(".")[0]


def _check_words(value: Any, where: str) -> None:
    """Refuse other keys than those that are chosen, and other values than names, numbers, and tables of numbers."""
    forms.some_of(**dict.fromkeys(_KEYS, _check_value))(value, where)


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, dict):
        forms.table(_NUMBER, _CLASS_NAME)(value, where)
    elif isinstance(value, list):
        forms.list_of(_NUMBER)(value, where)
    elif not (isinstance(value, str) and value.isidentifier()):
        _NUMBER(value, where)


_NUMBER = forms.number(0, 2**40)
_FORM = forms.record(about=forms.text, choices=forms.list_of(forms.record(words=_check_words, reason=forms.text)))


def read_choices(path: Path) -> tuple[str, list[RecipeChoice]] | None:
    """Return the stored summary and choices; None if the file is absent or damaged. Damage is logged."""
    found = read_valid_note(
        path,
        lambda path: forms.read_json(path, _FORM),
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
    rows = [
        (" ".join(f"{key}={_format_choice(value)}" for key, value in each.words.items()), each.reason)
        for each in choices
    ]
    return [one_line(f"  {words}: {reason}.") for words, reason in rows]


def _format_choice(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {number:g}" for name, number in value.items()) + "}"
    return format_override(value)


def recipe_text(about: str, choices: Sequence[RecipeChoice]) -> str:
    """Return choices as a recipe: a config file of the group hparam."""
    lines = ["# @package _global_", _comment(f"Chosen by hparam=auto: {about}.")]
    keys: dict[str, Any] = {}
    groups: dict[str, Any] = {}
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


def drop_typed(choices: Iterable[RecipeChoice], given: frozenset[str]) -> tuple[list[RecipeChoice], list[str]]:
    """Return the choices without typed keys or keys implied by typed ones, and the sorted list of those typed keys."""
    left = []
    taken = set[str]()
    for choice in choices:
        typed = {key: given & {key, *_IMPLIED_BY.get(key, ())} for key in choice.words}
        taken = taken.union(*typed.values())
        words = {key: value for key, value in choice.words.items() if not typed[key]}
        if words:
            left.append(replace(choice, words=words))
    return left, sorted(taken)


def typed_keys(words: Sequence[str]) -> frozenset[str]:
    """Return the keys and groups that the words of a command line set."""
    return frozenset(each.key_or_group for each in OverridesParser.create().parse_overrides(list(words)))


def compose_recipe(words: Sequence[str], folders: Sequence[str], text: str) -> DictConfig:
    """Return the config of a command line with a recipe of the given text instead of its own.

    Precedence is unchanged: typed values and `local` override the recipe. Its name in `choices` is `auto`, under which
    its runs are listed.

    Args:
        words: the command line.
        folders: further folders of config groups.
        text: content of the recipe's file.
    """
    options, values, more = read_words(words, [SHIPPED, *map(Path, folders)])
    own = [*folders, *map(str, more)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "hparam" / f"{NAME}.yaml"
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        cfg = compose({**options, "hparam": NAME}, values, [*own, folder]).cfg
    return OmegaConf.merge(cfg, {"choices": {"hparam": AUTO}, "config_dirs": own})  # type: ignore[return-value]
