"""Log of a run: on the terminal, and in `run.log` of its folder."""

import logging
import os
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from dinoseg.runs.folder import LOG
from dinoseg.utils.wording import printable

_TRANSIENT = "transient"  # attribute of records that only the terminal shows
NOISY = ("httpx", "accelerate", "transformers", "matplotlib", "PIL")  # loggers that show errors only
LABEL = "DINOSEG_LABEL"  # environment variable: prefix of terminal lines where several jobs share a terminal


class LabelledStream:
    """Text stream that starts each line with a label, and otherwise behaves like the wrapped stream."""

    def __init__(self, stream: Any, label: str) -> None:
        self.stream, self._label, self._within = stream, label, False

    def write(self, text: str) -> int:
        """Write text, with the label at the start of each line."""
        if not text:
            return 0
        start = "" if self._within else self._label
        self._within = not text.endswith("\n")
        return self.stream.write(start + text[:-1].replace("\n", f"\n{self._label}") + text[-1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class PrintableStream:
    """Text stream whose written text is made `printable`, and that otherwise behaves like the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def configure_log(folder: Path | None) -> None:
    """Send the log to the terminal and the run folder's `run.log`; without a folder (other ranks), only warnings."""
    out, err = (stream.stream if isinstance(stream, LabelledStream) else stream for stream in (sys.stdout, sys.stderr))
    if isinstance(out, TextIOWrapper):  # in processes of ranks and launchers, which do not pass through `__main__`
        out.reconfigure(errors="backslashreplace")
    if not isinstance(out, PrintableStream):
        out = PrintableStream(out)  # printed text contains file names, too
    label = os.environ.get(LABEL, "")
    sys.stdout, sys.stderr = (cast(TextIO, LabelledStream(each, label) if label else each) for each in (out, err))
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
    threading.excepthook = _log_thread_error
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


def announce(step: str) -> None:
    """Log on the terminal that a long step begins.

    The log file omits it. If a run fails in its first steps, the file is thus empty and its run folder is removed.
    """
    logging.getLogger(__name__).info("%s ...", step, extra={_TRANSIENT: True})


def _log_thread_error(caught: threading.ExceptHookArgs) -> None:
    """Log an OSError of a thread, such as TensorBoard's writer, in one line; pass other errors to the default hook."""
    if isinstance(caught.exc_value, OSError):
        logging.getLogger(__name__).warning("Writing failed: %s", caught.exc_value)
    else:
        threading.__excepthook__(caught)


class LogFile(logging.FileHandler):
    """Log file that closes after a write error, as on a full disk, with one warning; the terminal log continues."""

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
