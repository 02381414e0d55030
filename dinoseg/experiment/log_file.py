"""A run's log: to the terminal and to `run.log` in its folder."""

import logging
import os
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from dinoseg.experiment.folder import LOG
from dinoseg.utils.wording import Printable, printable

_TRANSIENT = "transient"  # attribute of records that are for the terminal alone
LABEL = "DINOSEG_LABEL"  # of the environment: what lines on the terminal begin with, where several jobs write there


class Labelled:
    """A text stream whose lines begin with a label; else the stream itself."""

    def __init__(self, stream: Any, label: str) -> None:
        self.stream, self._label, self._within = stream, label, False

    def write(self, text: str) -> int:
        """Write it."""
        if not text:
            return 0
        start = "" if self._within else self._label
        self._within = not text.endswith("\n")
        return self.stream.write(start + text[:-1].replace("\n", f"\n{self._label}") + text[-1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def configure_log(folder: Path | None) -> None:
    """Send the log to the terminal and the run folder's `run.log`; without a folder (other ranks) only warnings."""
    out, err = (stream.stream if isinstance(stream, Labelled) else stream for stream in (sys.stdout, sys.stderr))
    if isinstance(out, TextIOWrapper):  # of a rank or a launcher's process, which `__main__` has not prepared
        out.reconfigure(errors="backslashreplace")
    if not isinstance(out, Printable):
        out = Printable(out)  # what is printed names files, too
    label = os.environ.get(LABEL, "")
    sys.stdout, sys.stderr = (cast(TextIO, Labelled(each, label) if label else each) for each in (out, err))
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        handlers.append(LogFile(folder / LOG, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].addFilter(lambda record: not hasattr(record, _TRANSIENT))
    for handler in handlers:
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(
        level=logging.WARNING if folder is None else logging.INFO,
        handlers=handlers,
        force=True,
    )
    threading.excepthook = _tell_thread_error
    for noisy in ("httpx", "accelerate", "transformers", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def announce(step: str) -> None:
    """Log on the terminal that a long step begins.

    The log file does not hold it: it stays empty, and its run folder is removed, where a run fails in its first steps.
    """
    logging.getLogger(__name__).info("%s ...", step, extra={_TRANSIENT: True})


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
