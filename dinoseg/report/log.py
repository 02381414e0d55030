"""What a run writes while it goes: metrics.jsonl, validation pictures, and both for TensorBoard with the settings."""

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
_STEP = re.compile(r"step_(\d+)")  # a folder of pictures
_ROW = forms.table(forms.maybe(forms.number(-1e300, 1e300)))
_MOST_BYTES = 2**30  # of a log: a row has about 300, and a training at most some millions of them


class RunLog:
    """Writes one JSON line per call to `out_dir`/metrics.jsonl, and the same to `out_dir`/tensorboard.

    Pictures become `out_dir`/validation/step_00500/NAME.png. A run that goes on from `start_step` first drops what a
    killed run had written beyond it; where the validation at that step is `owed`, so made again, its row as well. With
    `visible` off (every rank but the first) nothing is written.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        tensorboard: bool = True,
        start_step: int = 0,
        owed: bool = False,
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
            _drop_after(path, start_step, owed=owed)
        self._pictures = out_dir / "validation"
        _drop_pictures_after(self._pictures, start_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = _open_board(out_dir / _BOARD, start_step)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values such as `train/loss` or `val/miou`; None and non-finite ones become null."""
        finite = {key: _finite(value) for key, value in values.items()}
        if self._file is not None:
            self._file.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in finite.items():
                if value is not None:
                    self._board.add_scalar(key, value, step)

    def pictures(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Keep pictures (H, W, 3) uint8 of a validation by the names of its samples."""
        for name, rgb in named.items() if self._file is not None else ():
            write_png(self._pictures / f"step_{step:05d}" / f"{name}.png", rgb)
            if self._board is not None:
                self._board.add_image(f"val/{name}", rgb, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        file, board = self._file, self._board
        self._file = self._board = None
        with ExitStack() as stack:  # each, also where another cannot be flushed
            for writer in (file, board):
                if writer is not None:
                    stack.callback(writer.close)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_settings(out_dir: str | Path, settings: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Give TensorBoard's table of runs a row: settings such as `trainer.steps`, and the final scores.

    What is neither a number, a text nor true or false is left out of both.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shown = {key: value for key, value in settings.items() if isinstance(value, int | float | str)}
    final = {f"final/{key}": value for key, value in scores.items() if isinstance(value, float)}
    with SummaryWriter(str(Path(out_dir) / _BOARD)) as board:
        # what add_hparams does, but for its folder of its own, which would be a run beside this one
        for summary in hparams(shown, final):
            board.file_writer.add_summary(summary)
        for key, value in final.items():
            board.add_scalar(key, value)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a last line that a killed run left unfinished is left out.

    Raises:
        UserError: the file is missing, or another line is no JSON object of numbers with a step.
    """
    path = Path(path)
    try:
        lines = forms.read_regular(path, _MOST_BYTES).decode("utf-8", errors="replace").split("\n")
    except forms.Misshapen as error:
        raise UserError(f"{path} is no log of a training ({error}). Remove it.") from None
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
            if number < len(lines):  # a finished line ends in a line break, so the torn one is the last
                raise UserError(
                    f"Line {number} of {path} is no JSON object of numbers with a step. Repair or remove that line."
                ) from None
    return rows


def _drop_after(path: Path, step: int, *, owed: bool) -> None:
    rows = [row for row in read_rows(path) if row["step"] <= step]
    kept = [row for row in rows if not (owed and row["step"] == step and any(key.startswith("val/") for key in row))]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


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
