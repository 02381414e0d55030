"""Base class of loggers, which receive what a training logs in addition to metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

Status = Literal["finished", "failed", "killed"]  # of a training that has ended


class Logger:
    """Base class of loggers: only rank 0 makes one, and each method does nothing by default.

    An exception in any method closes and drops the logger with one warning, and the training continues. Only a
    `UserError` of the constructor ends the run.

    Args:
        out_dir: the run folder, which exists.
        start_step: steps done before. A run that resumes may have logged later steps before it was killed; these are
            logged again.

    Attributes:
        view: how to view what was logged, printed after the training; empty: nothing to print.
        timeout: seconds after which a call counts as failed; its methods then run in a thread, so that no training
            waits for a server, and the constructor must not wait either. None: they run at once.
        is_enabled: False: its settings disable it, so no other method is called. The constructor logs why.
    """

    view: str = ""
    timeout: float | None = None
    is_enabled: bool = True

    def __init__(self, out_dir: Path, *, start_step: int = 0) -> None:
        pass

    @classmethod
    def check_installed(cls) -> None:
        """Refuse a package that is not installed, before data and weights are read.

        Raises:
            UserError: naming the package and how to install it.
        """

    def config(self, settings: Mapping[str, Any]) -> None:
        """Receive the settings that distinguish runs, by dotted name such as `optim.optimizer.lr`, before all else."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Receive finite values after a step, such as `train/loss` or `val/miou`."""

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Receive images (H, W, 3) uint8 of the validation after a step, by the names of its samples."""

    def scores(self, values: Mapping[str, Any]) -> None:
        """Receive the scores of the best checkpoint after the training: numbers, and tables such as `matrix`."""

    def checkpoint(self, path: Path) -> None:
        """Receive the file of the best checkpoint, after its scores."""

    def close(self, *, status: Status = "finished") -> None:
        """Write buffered values, and close files and connections.

        Args:
            status: how the training ended: finished; failed by an error, or this logger is dropped; killed by a signal.
        """
