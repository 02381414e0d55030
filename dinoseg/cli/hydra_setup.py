"""Adaptations of Hydra 1.3 to this program; processes of launchers (joblib, Slurm) import them with its callback."""

import argparse
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dinoseg.config.resolvers import register_resolvers
from dinoseg.runs.folder import record_new_folders


class FolderCallback(Callback):
    """Hydra callback that records which folders Hydra is about to create; older folders are never removed."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Record the folders of a single run."""
        with suppress(OmegaConfBaseException):  # Hydra reports a name that cannot be resolved right after this
            record_new_folders(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Record the folders of a sweep."""
        record_new_folders(Path(config.hydra.sweep.dir))


def set_up_hydra() -> None:
    """Register the resolvers of our config files; suppress a wrong warning and an error of Hydra 1.3."""
    register_resolvers()
    # it takes our launcher configs for schemas, as they share the plug-ins' names
    warnings.filterwarnings("ignore", "(?s).* is validated against ConfigStore schema")
    # Python 3.14 formats each help text when it is added, which fails on an object that Hydra passes
    argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]


@contextmanager
def hide_base_options(arguments: Sequence[str]) -> Iterator[None]:
    """Remove options such as `head=_object` from the suggestions that Hydra prints for a shell's tab completion.

    Hydra knows no hidden options; a leading underscore marks them here.

    Args:
        arguments: the command line; nothing is changed unless it asks for suggestions.
    """
    if not any(word.startswith("query=") for word in arguments):
        yield
        return
    suggestions = StringIO()
    with redirect_stdout(suggestions):
        yield
    print(re.sub(r"\S+=_\S*\s?", "", suggestions.getvalue()), end="")


set_up_hydra()  # in processes of launchers, which import this module and do not run `__main__`
