"""`hparam=auto`: choices for a command line, made once and stored, so that the same command gets the same choices."""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dinoseg import __version__
from dinoseg.autotune.rules import CHOOSING, RecipeChoice
from dinoseg.cli.auto.given import drop_typed
from dinoseg.cli.auto.search import ComposedRecipe, RecipeSearch
from dinoseg.config.checks import check_arguments
from dinoseg.config.job import job_config
from dinoseg.config.plain import BUILDS, to_container
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.splits import evenly_spaced_subset
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import LENGTHS, config_description, recipe_of
from dinoseg.experiment.step import check_trainer, training_parts
from dinoseg.tasks.images import SAMPLING
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_text
from dinoseg.utils.cores import count_cores, ranks_here
from dinoseg.utils.errors import UserError
from dinoseg.utils.locks import locked
from dinoseg.utils.units import finished
from dinoseg.utils.wording import format_override, one_line, printable

AUTO = "auto"  # name of the recipe that is chosen automatically
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # environment variables that make a process a rank
# overrides that do not affect the choices
_OF_A_RUN = ("seed", "resume", "budget", "logger", "hydra", "mode", "hparam")


NAME = "chosen"  # of the written recipe
GROUPS = ("adapter", "head", "loss")  # config groups whose option is chosen
_NAMES = rf"(?!(?:{'|'.join(BUILDS)})$).*"  # keys of a table, except those of `BUILDS`
_MAX_BYTES = 2**20  # of a file of choices, which takes a few thousand
_MAX_PIXELS = 2**30  # of the images in a batch, as in a checkpoint's config
_COUNT, _SIDE, _RATE = forms.whole(1, 2**40), forms.whole(1, 2**20), forms.number(0, 100)


_SEARCHED = "hydra.searchpath"


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
        if not path.exists():
            write_text(path, self.text)
        folders = [f"file://{Path(each).absolute()}" for each in user_folders()]
        search_path = [searching(folders)] if folders else []
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
    build = Builder(cfg)
    _check(build)
    minutes = cfg.budget.minutes
    given = typed_keys(words)
    train, val = build.dataset("train", reduced=True), build.dataset("val")
    path = _path(build, given, (train, val))
    source = f"reused from {path} (remove it to choose again)"
    # concurrent commands, such as the jobs of a sweep over seeds, wait and reuse the choices
    with _one_at_a_time(path):
        stored = read_choices(path)
        if stored is None:
            most = f"candidates are timed for at most {60 * CHOOSING * minutes:.0f} s"
            _log_progress(f"inspects data and machine: budget.minutes={minutes:g} starts now, {most}")
            trying = [*words, *_shared()]
            joined = ranks_here() if _shared() else 0
            with _outside_ranks():
                engine = build.engine(devices=1)
                data = train, evenly_spaced_subset(val, cfg.trainer.get("val_images"))
                search = RecipeSearch(
                    partial(_read, trying), data, engine, given, minutes, _log_progress, joined=joined
                )
                choices = search.choose()
            stored, source = (search.about, choices), "chosen now"
            _store_choices(path, *stored)
    about, choices = stored
    choices, taken = drop_typed(choices, given)  # the file stores all: other keys may be typed next
    about += f"; set on the command line: {', '.join(taken)}" if taken else ""
    print(printable(f"hparam=auto: {about}; {source}:\n\n" + "\n".join(choice_lines(choices))))
    remaining = [
        word for word in words if _root(word.lstrip("+~").partition("=")[0]) not in ("budget", "hparam", "resume")
    ]
    return ChosenRecipe(_composed(words, about, choices), recipe_text(about, choices), remaining)


def _log_progress(doing: str) -> None:
    print(printable(f"hparam=auto {doing}"), file=sys.stderr)


def _composed(words: Sequence[str], about: str, choices: Sequence[RecipeChoice]) -> DictConfig:
    return composed_with(words, NAME, recipe_text(about, choices), known_as=AUTO)


def _check(build: Builder) -> None:
    """Refuse what hparam=auto cannot choose for, and values that training would refuse only later."""
    minutes = build.value("budget.minutes")
    check_arguments("dinoseg.cli.auto.search.RecipeSearch", {"minutes": minutes}, {"minutes": "budget.minutes"})
    if build.task().on_clips or "unlabelled" in build.value("trainer"):
        raise UserError(
            f"hparam=auto chooses for images and their masks, not for trainer={build.options['trainer']}. Choose a "
            "recipe: mode=help lists them."
        )
    check_trainer(build)
    build.lengths(samples=1)
    build.arguments(ImageDataModule, SAMPLING)
    build.part("data.augment")  # refuses an invalid crop
    build.arguments(evenly_spaced_subset, {"count": "trainer.val_images"})


def _read(words: Sequence[str], choices: Sequence[RecipeChoice]) -> ComposedRecipe:
    """Return the values of the config that a command line composes with choices."""
    cfg = _composed(words, "trying", choices)
    rates = cfg.optim.optimizer
    return ComposedRecipe(
        values=to_container(cfg),
        parts=partial(training_parts, Builder(cfg)),
        adapter=cfg.choices.adapter,
        head=cfg.choices.head,
        crop=tuple(cfg.resolution.crop),
        scale=cfg.resolution.scale,
        longest=cfg.resolution.longest,
        batch_size=cfg.data.batch_size,
        accumulate=cfg.trainer.accumulate,
        views=cfg.data.get("views"),
        class_mix=cfg.data.get("class_mix", 0.0),
        cache=cfg.engine.cache,
        cache_dir=cfg.cache_dir,
        devices=cfg.engine.devices,
        head_lr=rates.head_lr,
        backbone_lr=rates.backbone_lr,
        freezes="freeze_backbone_until" in rates,
    )


def _path(build: Builder, given: frozenset[str], data: Sequence[SegmentationData]) -> Path:
    """Return the file that stores the choices, named by a hash of their inputs.

    The machine's current speed is not part of the hash.
    """
    depends = {
        "version": __version__,
        "recipe": {key: value for key, value in recipe_of(config_description(build)).items() if key != "seed"},
        "given": sorted(key for key in given if _root(key) not in _OF_A_RUN and key.rpartition(".")[2] not in LENGTHS),
        "minutes": float(build.value("budget.minutes")),
        "data": [each.fingerprint() if isinstance(each, PairDataset) else list(each.names) for each in data],
        "engine": {
            key: to_container(build.value("engine"))[key]
            for key in ("device", "precision", "cache", "devices", "sharding")
        },
        # the first rank of a restarted job may be on another machine
        "machine": _shared() or (platform.node(), count_cores()),
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
    return build.cache_dir / f"choices_{key[:16]}.json"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lock out processes that make the same choices; a no-op if the lock file cannot be written."""
    with ExitStack() as stack:
        with suppress(OSError):  # `_store_choices` reports it when it writes to the same folder
            stack.enter_context(locked(path.with_suffix(".lock")))
        yield


def _store_choices(path: Path, about: str, choices: Sequence[RecipeChoice]) -> None:
    try:
        write_choices(path, about, choices)
    except OSError as error:
        message = f"warning: cannot write the choices to {path} ({error}): the next run chooses again."
        print(printable(message), file=sys.stderr)  # no log is open yet


def _shared() -> list[str]:
    """Return the override for the number of ranks that share a batch, if torchrun or Slurm started them."""
    return [f"engine.devices={os.environ['WORLD_SIZE']}"] if "WORLD_SIZE" in os.environ else []


@contextmanager
def _outside_ranks() -> Iterator[None]:
    """Remove the rank variables from the environment for the block, since a single process is timed."""
    before = {name: os.environ.pop(name) for name in _RANKS if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def _root(key: str) -> str:
    return key.partition(".")[0]


def _name(*names: str) -> forms.Form:
    """Return the form of one of some names, or without names of any option of a config group."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or not (value in names if names else re.fullmatch(r"[a-z]\w*", value)):
            raise forms.SchemaError(f"{where:.99} is {value!r:.60}; it must be {' or '.join(names) or 'a name'}")

    return check


def _class_weights(value: Any, where: str) -> None:
    """Validate `loss.weights`: none, or a table from class name to weight without a `_target_`."""
    if value != "none":
        forms.table(forms.number(0, 2**20), _NAMES)(value, where)


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
    if pixels > _MAX_PIXELS:
        raise forms.SchemaError(f"{where} makes batches of {pixels} pixels; the limit is {_MAX_PIXELS}")


_FORM = forms.record(about=forms.text, choices=_choices)


def read_choices(path: Path) -> tuple[str, list[RecipeChoice]] | None:
    """Return the stored summary and choices; None if the file is absent or damaged. Damage is logged."""
    found = finished(
        path,
        lambda path: forms.read_json(path, _FORM, most=_MAX_BYTES),
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
    return format_override(value)


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


def typed_keys(words: Sequence[str]) -> frozenset[str]:
    """Return the keys and groups that the words of a command line set."""
    return frozenset(each.key_or_group for each in OverridesParser.create().parse_overrides(list(words)))


def user_folders() -> list[str]:
    """Return the folder that `--config-dir` names, as a list; empty if it is not given."""
    return [each.path for each in HydraConfig.get().runtime.config_sources if each.provider == "command-line"]


def searching(folders: Sequence[str]) -> str:
    """Return the override that adds folders, of any name, to Hydra's search path for configs."""
    quoted = ["'" + folder.replace("'", "\\'") + "'" for folder in folders]
    return f"{_SEARCHED}=[{','.join(quoted)}]"


def composed_with(words: Sequence[str], name: str, text: str, *, known_as: str) -> DictConfig:
    """Return the config of a command line with a recipe of the given text instead of its own.

    Precedence is unchanged: typed values and `local` override the recipe.

    Args:
        words: the command line.
        name: name of the recipe.
        text: content of the recipe's file.
        known_as: the recipe's name in `choices`, under which its runs are listed.
    """
    overrides = OverridesParser.create().parse_overrides(list(words))
    remaining = [str(each.input_line) for each in overrides if each.key_or_group not in ("hparam", _SEARCHED)]
    folders = [folder for each in overrides if each.key_or_group == _SEARCHED for folder in each.value() or ()]  # type: ignore[union-attr]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "hparam" / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        searched = searching([*map(str, folders), f"file://{folder}"])
        composed = compose("main", [*remaining, searched, f"hparam={name}"], return_hydra_config=True)
        cfg = job_config(composed, composed.hydra.runtime)
    own = [each for each in cfg.config_dirs if each != folder]
    return OmegaConf.merge(cfg, {"choices": {"hparam": known_as}, "config_dirs": own})  # type: ignore[return-value]
