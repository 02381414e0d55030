"""Launchers and sweepers that are installed only where they are asked for."""

import warnings
from collections.abc import Sequence

from hydra.core.override_parser.types import IntervalSweep

from dinoseg.cli.words import assignments, is_sweep, parsed
from dinoseg.utils.errors import UserError

_INSTALLED_BY = {
    "hydra/launcher": {
        "joblib": "dinoseg[joblib]",
        "submitit_local": "dinoseg[submitit]",
        "submitit_slurm": "dinoseg[submitit]",
        "ray": "hydra-ray-launcher",  # no extra: its cloudpickle below 3 would be everybody's in one lock file
    },
    "hydra/sweeper": {"optuna": "dinoseg[optuna]"},
}


def hush_schemas() -> None:
    """Say nothing of our files for launchers having the names of their plug-ins, which Hydra 1.3 means for schemas."""
    warnings.filterwarnings("ignore", "(?s).* is validated against ConfigStore schema")


def check_intervals(arguments: Sequence[str]) -> None:
    """Refuse an interval where nothing searches in it.

    Raises:
        UserError: naming the sweeper that does.
    """
    words = [word for _, word in assignments(arguments)]
    if is_sweep(arguments) and any(word.startswith("hydra/sweeper=") for word in words):
        return
    for word in words:
        override = parsed(word)
        if override is not None and isinstance(override.value(), IntervalSweep):
            raise UserError(f"{word} is an interval, to be searched in: add -m hydra/sweeper=optuna, or give values.")


def missing_extra(arguments: Sequence[str], error: Exception) -> str:
    """Return what a command line needs that could not be imported, and how to get it; "" where it names none.

    Args:
        arguments: the command line, without the program's name.
        error: what Hydra raised when it made its launcher or sweeper.
    """
    if isinstance(error, RuntimeError) and "Unknown plugin class" not in str(error):
        return ""
    for _, word in assignments(arguments):
        group, _, option = word.partition("=")
        if package := _INSTALLED_BY.get(group, {}).get(option):
            said = str(error).split("\n")[0]
            return f"{word} needs what is not installed here: pip install '{package}' ({said})"
    return ""
