"""Config files of run folders, read as untrusted text: the data set of a run, and the keys that identify a recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf.errors import OmegaConfBaseException

from dinoseg.config.options import choices_of
from dinoseg.config.plain import BUILDS, flatten
from dinoseg.config.resolvers import CLASS_FILE
from dinoseg.config.stored import Source, compose_stored, description_of
from dinoseg.core.shapes import SegmentationData
from dinoseg.experiment.builder import Builder
from dinoseg.training.description import SAVED
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import SchemaError, as_read_back
from dinoseg.utils.yaml_text import read_yaml

BROKEN = (OSError, UnicodeError, KeyError, TypeError, AssertionError, SchemaError, OmegaConfBaseException)
# interpolation in a training's config; its evaluations store the value
_CLASS_FILE_INTERPOLATION = f"${{{CLASS_FILE}:"
T = TypeVar("T")
_ELSEWHERE = ("seed", "data.root", "metric.", "choices.metric")  # may differ within a recipe


def config_file(folder: Path) -> Path:
    """Return the path of an evaluation's config: in its folder, or in that of the training it ends."""
    places = [folder / "config" / "config.yaml", folder.parent / "config" / "config.yaml"]
    return next((path for path in places if path.is_file()), places[0])


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file, with interpolations unresolved; errors are among `BROKEN`."""
    config: dict[str, Any] = read_yaml(path)
    return config


def open_saved_data(builder: Builder, folder: Path, *, root: str, split: str) -> SegmentationData:
    """Return the data set of an evaluation, see `build_saved`.

    Args:
        builder: of the config composed from the command line.
        folder: folder of the evaluation.
        root: folder of the data set, as the evaluation recorded it.
        split: train, val or test.

    Raises:
        UserError: the config is missing or refused, or the data set is missing.
    """
    return build_saved(builder, folder, root, lambda builder: builder.dataset(split))


def build_saved(builder: Builder, folder: Path, root: str, build: Callable[[Builder], T], *groups: str) -> T:
    """Return a part of an evaluation, built from its saved config under the rules for checkpoint configs.

    Args:
        builder: of the config composed from the command line.
        folder: folder of the evaluation.
        root: folder of the data set, as the evaluation recorded it.
        build: returns the part, from a builder of the saved config.
        groups: config groups that the part needs besides the data and the task.

    Raises:
        UserError: the config is missing or refused, or the part cannot be built.
    """
    path = config_file(folder)
    try:
        config = as_read_back(read_config(path))
        config["data"]["root"] = root
        source = Source(str(path), builder.config.get("config_dirs", ()), builder.config["trust"] or ())
        # a run with the task's own metrics has no key of the group
        typed = [group for group in groups if group in config]
        description = description_of(config, ("seed", "resolution", "data", "task", *typed), source)
        return build(Builder.of({**builder.config, **compose_stored(description, source)}))
    except BROKEN as error:
        raise UserError(f"{path} does not define the {' and '.join(('dataset', *groups))} ({error}).") from None


def recipes(folders: Sequence[Path]) -> list[tuple[dict[str, Any], Any] | None]:
    """Return the training recipe of each evaluated model, by full key, and its seed; None without a readable config.

    Keys that one config leaves to the data's class file are removed from all: other configs may store their values. So
    are names of classes and interpolations: a mode that does not build a group stores its values alone.
    """
    found = [_recipe_keys(folder) for folder in folders]
    left = {key for recipe in found if recipe for key, value in recipe[0].items() if _is_of_class_file(value)}

    def is_left(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:count]) in left for count in range(1, len(parts) + 1))

    return [
        recipe
        and (
            {key: value for key, value in recipe[0].items() if not (is_left(key) or "${" in str(value))},
            recipe[1],
        )
        for recipe in found
    ]


def _recipe_keys(folder: Path) -> tuple[dict[str, Any], Any] | None:
    try:
        config = read_config(config_file(folder))
        whole = dict(flatten({key: config[key] for key in SAVED if key in config}))
        options = dict(flatten({"choices": choices_of(config.get("choices", {}), SAVED)}))
    except (UserError, *BROKEN):
        return None
    values = {key: value for key, value in whole.items() if key.rpartition(".")[2] not in BUILDS} | options
    return {key: value for key, value in values.items() if not key.startswith(_ELSEWHERE)}, whole.get("seed")


def _is_of_class_file(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_CLASS_FILE_INTERPOLATION)
