"""A run's log: to the terminal and to `run.log` in its folder."""

import logging
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO, cast

from dinoseg.runs.folder import LOG
from dinoseg.wording import Printable, printable


def configure_log(folder: Path | None) -> None:
    """Send the log to the terminal and the run folder's `run.log`; without a folder (other ranks) only warnings."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        handlers.append(LogFile(folder / LOG, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: not every terminal shows every letter
    if not isinstance(sys.stdout, Printable):
        sys.stdout = cast(TextIO, Printable(sys.stdout))  # what is printed names files, too
    logging.basicConfig(
        level=logging.WARNING if folder is None else logging.INFO,
        handlers=handlers,
        force=True,
    )
    threading.excepthook = _tell_thread_error
    for noisy in ("httpx", "accelerate", "transformers", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _tell_thread_error(caught: threading.ExceptHookArgs) -> None:
    """Say in a line what the system refused a thread, such as TensorBoard's, which passes it on; else as ever."""
    if isinstance(caught.exc_value, OSError):
        logging.getLogger(__name__).warning("Writing has failed: %s", caught.exc_value)
    else:
        threading.__excepthook__(caught)


class LogFile(logging.FileHandler):
    """A log file; when it cannot be written, as on a full disk, that is said once and the terminal has the rest."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, D102 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger().removeHandler(self)
        with suppress(OSError):
            self.close()
        logging.getLogger(__name__).warning("%s ends here (%s).", self.baseFilename, error.strerror)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
