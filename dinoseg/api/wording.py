"""Errors of the command line in the terms of Python calls."""

from collections.abc import Iterator
from contextlib import contextmanager

from dinoseg.utils.errors import UserError, reword

_TERMS = {  # in this order, longer ones first
    "Add `--cfg job` to see all keys, `--help` alone to see all groups and options.": "docs/config.md lists the keys.",
    "--config-dir FOLDER, or config_dir=FOLDER in Python": "config_dir=FOLDER",
    "--config-dir FOLDER": "config_dir=FOLDER",
    "hydra.run.dir": "out_dir",
    "Set it on the command line: ": "Set it: ",
    "add -m hydra/sweeper=optuna to search it, or list values": "call the function once for each value",
    "For a run with each of them, add -m": "For a run with each of them, write a loop",
    "the command line": "the call",
}


@contextmanager
def python_terms() -> Iterator[None]:
    """Replace terms of the command line in the message of a UserError."""
    try:
        yield
    except UserError as error:
        error.args = (str(reword(error, _TERMS)),)
        raise
