"""Settings of a run by dotted name: for tables of runs, and to check that a resumed run has not changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoseg.config.plain import flatten
from dinoseg.experiment.models import ModelBuilder
from dinoseg.training.description import DESCRIBED_GROUPS, MODEL
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import as_read_back
from dinoseg.utils.wording import format_override


def settings_of(builder: ModelBuilder) -> dict[str, Any]:
    """Return the settings that distinguish runs in a table, such as `optim.optimizer.lr`.

    They are the seed, the chosen options, the batch size, and the values of `resolution` and of the groups in `MODEL`.
    """
    groups = {group: builder.settings(group) for group in ("resolution", *MODEL)}
    choices = {group: builder.options[group] for group in DESCRIBED_GROUPS}
    batch = {"batch_size": builder.value("data.batch_size")}
    nested = {"seed": builder.seed, "choices": choices, "data": batch, **groups}
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in flatten(nested)
        if not name.rpartition(".")[2].startswith("_")
    }


def check_same_settings(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, key: str = "mode.restart"
) -> None:
    """Refuse to resume a run with settings other than its first ones: its results would be inconsistent.

    Args:
        folder: the run folder.
        before: its settings, as read back.
        now: the settings of this run.
        key: config key with which the user named the folder.

    Raises:
        UserError: settings differ; the message names each of them.
    """
    were, are = dict(flatten(before)), dict(flatten(as_read_back(now)))
    differing = [
        f"{name} was {_value_text(were, name)} and is {_value_text(are, name)}"
        for name in sorted(were.keys() | are.keys())
        if were.get(name) != are.get(name)
    ]
    if differing:
        raise UserError(
            f"{key}={folder}: settings differ from that run: {'; '.join(differing)}. Use its settings (its command "
            f"line is in {folder / 'config' / 'overrides.txt'}), or start over without {key}."
        )


def _value_text(settings: Mapping[str, Any], name: str) -> str:
    return format_override(settings[name]) if name in settings else "not set"
