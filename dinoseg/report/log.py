"""Log of a run: metrics.jsonl, validation images, and the loggers that receive both."""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from dinoseg.report.loggers.logger import BackgroundLogger, Logger, Status
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import format_text, without_credentials

logger = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d+)")  # folder with the images of one validation


class LoggerFactory(Protocol):
    """Function that opens a logger for a run."""

    def __call__(self, out_dir: Path, *, start_step: int) -> Logger:
        """Return a logger, see `Logger`."""
        ...


class RunLog:
    """Writes one JSON line per call to `out_dir`/metrics.jsonl, and passes the same values to loggers.

    Images are written to `out_dir`/validation/step_00500/NAME.png. A run that resumes at `start_step` first drops
    everything that a killed run wrote after that step. With `validation_pending`, the validation at that step runs
    again, so its row is dropped, too. With `visible` off (all ranks but the first), nothing is written.

    A logger that raises an exception is closed as failed, and dropped with one warning.

    Attributes:
        views: after `close`, the lines that state how to view what the loggers wrote.

    Raises:
        UserError: by a logger that cannot be opened.
    """

    def __init__(
        self,
        out_dir: str | Path,
        loggers: Mapping[str, LoggerFactory] | None = None,
        *,
        start_step: int = 0,
        validation_pending: bool = False,
        visible: bool = True,
    ) -> None:
        self._file: TextIO | None = None
        self._loggers: dict[str, Logger] = {}
        self.views: list[str] = []
        if not visible:
            return
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / "metrics.jsonl"
        self._pictures = out_dir / "validation"
        if path.exists():
            _drop_after(path, start_step, validation_pending=validation_pending)
            _drop_pictures_after(self._pictures, start_step)
        self._file = path.open("a", encoding="utf-8")
        for name, open_logger in (loggers or {}).items():
            try:
                opened = open_logger(out_dir, start_step=start_step)
                if opened.is_enabled:
                    self._loggers[name] = opened if opened.timeout is None else BackgroundLogger(opened, opened.timeout)
            except UserError:
                self.close(status="failed")
                raise
            except Exception as error:
                _warn_of(name, error)

    def config(self, settings: Mapping[str, Any]) -> None:
        """Pass the settings of the run to the loggers."""
        self._pass_on(lambda each: each.config(settings))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values such as `train/loss` or `val/miou`; None and non-finite values become null."""
        finite = {key: _replace_nonfinite(value) for key, value in values.items()}
        if self._file is not None:
            self._file.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
            self._file.flush()
        numbers = {key: value for key, value in finite.items() if value is not None}
        self._pass_on(lambda each: each.scalars(step, numbers))

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Write images (H, W, 3) uint8 of a validation, by the names of its samples."""
        for name, rgb in named.items() if self._file is not None else ():
            write_png(self._pictures / f"step_{step:05d}" / f"{name}.png", rgb)
        self._pass_on(lambda each: each.images(step, named))

    def scores(self, values: Mapping[str, Any]) -> None:
        """Pass the scores of the best checkpoint to the loggers."""
        self._pass_on(lambda each: each.scores({**values}))

    def checkpoint(self, path: Path) -> None:
        """Pass the file of the best checkpoint to the loggers."""
        self._pass_on(lambda each: each.checkpoint(path))

    def close(self, *, status: Status = "finished") -> None:
        """Flush and close everything; a second call is a no-op.

        Args:
            status: how the training ended, which loggers report.
        """
        file, self._file = self._file, None
        self._pass_on(lambda each: each.close(status=status), closes=True)
        self.views += [each.view for each in self._loggers.values() if each.view]
        self._loggers = {}
        if file is not None:
            file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        is_signal = kind is not None and issubclass(kind, KeyboardInterrupt)  # `Interrupted` is one, also for SIGTERM
        self.close(status="finished" if kind is None else "killed" if is_signal else "failed")

    def _pass_on(self, call: Callable[[Logger], None], *, closes: bool = False) -> None:
        for name, each in [*self._loggers.items()]:
            try:
                call(each)
            except Exception as error:
                del self._loggers[name]
                _warn_of(name, error)
                if not closes:
                    with suppress(Exception):  # the first error is reported
                        each.close(status="failed")


def _warn_of(name: str, error: Exception) -> None:
    """Warn that a logger is dropped."""
    message = format_text(without_credentials(f"{type(error).__name__}: {error}"), 300)
    logger.warning(
        "logger.%s failed and is dropped (%s). The training continues, and metrics.jsonl has all values.", name, message
    )


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a last line that a killed run left unfinished.

    Raises:
        OSError: the file cannot be read.
        UserError: another line is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):  # a complete line ends in a line break, so only the last can be torn
                raise UserError(f"Line {number} of {path} is not JSON. Repair or remove it.") from None
    return rows


def _drop_after(path: Path, step: int, *, validation_pending: bool) -> None:
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if validation_pending:
        rows = [row for row in rows if row["step"] != step or not any(key.startswith("val/") for key in row)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _drop_pictures_after(folder: Path, step: int) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        numbered = _STEP.fullmatch(path.name)
        if numbered and int(numbered[1]) > step:
            shutil.rmtree(path)


def _replace_nonfinite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
