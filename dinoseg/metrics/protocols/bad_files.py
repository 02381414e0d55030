"""Collection of all bad files of a case that is scored as a whole: one drops the case, but all are named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np

from dinoseg.metrics.protocols.contract import BadFile
from dinoseg.metrics.protocols.trees import refuse_other_size


class BadFiles:
    """Collects the bad files of a case, each with its first reason.

    Args:
        unit: name of the unit that is left out, such as `sequence`.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._reasons: dict[Path, str] = {}

    def __bool__(self) -> bool:
        """Return whether there are any bad files."""
        return bool(self._reasons)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record a file that turns out bad inside the block, and continue after the block."""
        try:
            yield
        except BadFile as error:
            for path, reason in ((error.path, error.reason), *error.more):
                self._reasons.setdefault(path, reason)

    def read_pair(
        self, file: Path, predicted: Path, read: Callable[[Path], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return reference and prediction (H, W); None if they are unreadable or differ in size, which is recorded."""
        maps = []
        for path in (file, predicted):
            with self.noted():
                maps.append(read(path))
        if len(maps) < 2:
            return None
        with self.noted():
            refuse_other_size(maps[0], maps[1], predicted)
            return maps[0], maps[1]
        return None

    def refuse(self) -> NoReturn:
        """Raise a `BadFile` that names all bad files."""
        (path, reason), *more = (
            (path, f"{reason.rstrip('.')}, so its {self._unit} is not scored.")
            for path, reason in self._reasons.items()
        )
        raise BadFile(path, reason, tuple(more))
