"""Logs of a run: metrics.jsonl, validation images, and both for TensorBoard together with the settings."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dinoseg.utils import forms
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

_BOARD = "tensorboard"
_STEP = re.compile(r"step_(\d+)")  # folder with the images of one validation
_ROW = forms.table(forms.maybe(forms.number(-1e300, 1e300)))
_MOST_BYTES = 2**30  # maximum bytes of a log: a row has about 300, a training at most some million rows


class RunLog:
    """Writes one JSON line per call to `out_dir`/metrics.jsonl, and the same values to `out_dir`/tensorboard.

    Images are written to `out_dir`/validation/step_00500/NAME.png. A run that resumes at `start_step` first drops
    everything that a killed run wrote after that step. With `validation_pending`, the validation at that step runs
    again, so its row is dropped, too. With `visible` off (all ranks but the first), nothing is written.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        tensorboard: bool = True,
        start_step: int = 0,
        validation_pending: bool = False,
        visible: bool = True,
    ) -> None:
        self._file: TextIO | None = None
        self._board: Any = None
        if not visible:
            return
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / "metrics.jsonl"
        if path.exists():
            _drop_after(path, start_step, validation_pending=validation_pending)
        self._pictures = out_dir / "validation"
        _drop_pictures_after(self._pictures, start_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = _open_board(out_dir / _BOARD, start_step)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values such as `train/loss` or `val/miou`; None and non-finite values become null."""
        finite = {key: _finite(value) for key, value in values.items()}
        if self._file is not None:
            self._file.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in finite.items():
                if value is not None:
                    self._board.add_scalar(key, value, step)

    def pictures(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Write images (H, W, 3) uint8 of a validation, by the names of its samples."""
        for name, rgb in named.items() if self._file is not None else ():
            write_png(self._pictures / f"step_{step:05d}" / f"{name}.png", rgb)
            if self._board is not None:
                self._board.add_image(f"val/{name}", rgb, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close all writers; a second call is a no-op."""
        file, board = self._file, self._board
        self._file = self._board = None
        with ExitStack() as stack:  # closes each writer even if another fails
            for writer in (file, board):
                if writer is not None:
                    stack.callback(writer.close)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_settings(out_dir: str | Path, settings: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Add a row to TensorBoard's table of runs: settings such as `trainer.steps`, and the final scores.

    Settings other than numbers, strings and booleans are left out, and so are scores other than floats.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shown = {key: value for key, value in settings.items() if isinstance(value, int | float | str)}
    final = {f"final/{key}": value for key, value in scores.items() if isinstance(value, float)}
    with SummaryWriter(str(Path(out_dir) / _BOARD)) as board:
        # like add_hparams, but without its separate folder, which would appear as another run
        for summary in hparams(shown, final):
            board.file_writer.add_summary(summary)
        for key, value in final.items():
            board.add_scalar(key, value)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a last line that a killed run left unfinished.

    Raises:
        UserError: the file is missing, or another line is not a JSON object of numbers with a step.
    """
    path = Path(path)
    try:
        lines = forms.read_regular(path, _MOST_BYTES).decode("utf-8", errors="replace").split("\n")
    except forms.Misshapen as error:
        raise UserError(f"{path} is not a training log ({error}). Remove it.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Give the folder of a training run.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = forms.parse_json(line, _ROW)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # a complete line ends in a line break, so only the last can be torn
                raise UserError(
                    f"Line {number} of {path} is not a JSON object of numbers with a step. Repair or remove that line."
                ) from None
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


def _open_board(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
