"""Messages on errors of Hydra's launchers and sweepers, and on the packages that they need."""

import re
from collections.abc import Sequence
from traceback import walk_tb

from dinoseg.cli.words import assignments

_INSTALLED_BY = {
    "hydra/launcher": {
        "joblib": ".[joblib]",
        "submitit_local": ".[submitit]",
        "submitit_slurm": ".[submitit]",
        "ray": "hydra-ray-launcher",  # no extra: its cloudpickle below 3 would pin everybody in one lock file
    },
    "hydra/sweeper": {"optuna": ".[optuna]"},
}
_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_LAUNCHER = re.compile(r"hydra_plugins\.\w+_launcher\.")  # modules of launchers, as Hydra's plug-ins are named


def explain_plugin_error(arguments: Sequence[str], error: Exception) -> str:
    """Return the message on an error of Hydra's launchers, or on a package that they miss; "" for other errors.

    Args:
        arguments: the command line, without the program's name.
        error: raised while Hydra ran the command line.
    """
    return _find_missing_package(arguments, error) or _explain_launcher(arguments, error)


def _explain_launcher(arguments: Sequence[str], error: Exception) -> str:
    """Return which launcher raised an error, and the error in one line; "" if none did."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    plugin = next((name.split(".")[1] for name in modules if _LAUNCHER.match(name)), None)
    if plugin is None:
        return ""
    typed = [word for _, word in assignments(arguments) if word.startswith("hydra/launcher=")]
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    cause = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return (
        f"{typed[0] if typed else plugin} failed ({type(error).__name__}: {cause}). Check the keys of hydra.launcher, "
        "and that its cluster runs and accepts jobs. Jobs that have ended keep their run folders."
    )


def _find_missing_package(arguments: Sequence[str], error: Exception) -> str:
    """Return which override needs a package that is not installed, and how to install it; "" if none does.

    Args:
        arguments: the command line, without the program's name.
        error: raised by Hydra when it created its launcher or sweeper.
    """
    unknown = isinstance(error, RuntimeError) and "Unknown plugin class" in str(error)
    if not unknown and not isinstance(error, ImportError):
        return ""
    for _, word in assignments(arguments):
        group, _, option = word.partition("=")
        if package := _INSTALLED_BY.get(group, {}).get(option):
            message = str(error).split("\n")[0]
            location = "in your clone of dinoseg, " if package.startswith(".") else ""
            return f"{word} needs a package that is not installed ({message}): {location}pip install '{package}'"
    return ""
