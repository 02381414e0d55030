"""Logger that writes files for TensorBoard."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.report.loggers.logger import Logger, Status


class TensorBoardLogger(Logger):
    """Write to `out_dir`/tensorboard; settings and final scores become a row in TensorBoard's table of runs.

    Of the settings, numbers, strings and booleans are shown, and of the final scores, floats.
    """

    def __init__(self, out_dir: Path, *, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = out_dir / "tensorboard"
        self.view = f"TensorBoard:  tensorboard --logdir {shlex.quote(str(folder))}"
        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._settings: Mapping[str, Any] = {}

    def config(self, settings: Mapping[str, Any]) -> None:
        """Store the settings for the row that `scores` writes."""
        self._settings = settings

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value under its own tag."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Write images as `val/NAME`."""
        for name, rgb in named.items():
            self._writer.add_image(f"val/{name}", rgb, step, dataformats="HWC")

    def scores(self, values: Mapping[str, Any]) -> None:
        """Write the row of the run, and each score as `final/NAME`."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value for key, value in self._settings.items() if isinstance(value, int | float | str)}
        final = {f"final/{key}": value for key, value in values.items() if isinstance(value, float)}
        # like add_hparams, but without its separate folder, which would appear as another run
        for summary in hparams(plain, final):
            self._writer.file_writer.add_summary(summary)
        for key, value in final.items():
            self._writer.add_scalar(key, value)

    def close(self, *, status: Status = "finished") -> None:
        """Flush and close the file."""
        self._writer.close()
