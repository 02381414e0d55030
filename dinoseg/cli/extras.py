"""Launchers and sweepers that need optional packages."""

import warnings
from collections.abc import Sequence

from hydra.core.override_parser.types import IntervalSweep

from dinoseg.cli.words import assignments, is_sweep, parsed
from dinoseg.utils.errors import UserError

_INSTALLED_BY = {
    "hydra/launcher": {
        "joblib": ".[joblib]",
        "submitit_local": ".[submitit]",
        "submitit_slurm": ".[submitit]",
        "ray": "hydra-ray-launcher",  # no extra: its cloudpickle below 3 would pin everybody in one lock file
    },
    "hydra/sweeper": {"optuna": ".[optuna]"},
}


def hush_schemas() -> None:
    """Suppress a Hydra 1.3 warning: it takes our launcher configs for schemas, as they share the plug-ins' names."""
    warnings.filterwarnings("ignore", "(?s).* is validated against ConfigStore schema")


def check_intervals(arguments: Sequence[str]) -> None:
    """Refuse an interval if no sweeper searches it.

    Raises:
        UserError: naming the sweeper to use.
    """
    words = [word for _, word in assignments(arguments)]
    if is_sweep(arguments) and any(word.startswith("hydra/sweeper=") for word in words):
        return
    for word in words:
        override = parsed(word)
        if override is not None and isinstance(override.value(), IntervalSweep):
            raise UserError(f"{word} is an interval: add -m hydra/sweeper=optuna to search it, or list values.")


def missing_extra(arguments: Sequence[str], error: Exception) -> str:
    """Return which override needs a package that is not installed, and how to install it; "" if none does.

    Args:
        arguments: the command line, without the program's name.
        error: raised by Hydra when it created its launcher or sweeper.
    """
    if isinstance(error, RuntimeError) and "Unknown plugin class" not in str(error):
        return ""
    for _, word in assignments(arguments):
        group, _, option = word.partition("=")
        if package := _INSTALLED_BY.get(group, {}).get(option):
            message = str(error).split("\n")[0]
            location = "in your clone of dinoseg, " if package.startswith(".") else ""
            return f"{word} needs a package that is not installed ({message}): {location}pip install '{package}'"
    return ""
