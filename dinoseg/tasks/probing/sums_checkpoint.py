"""Saved sums of a long pass, in the run folder, from which the same command resumes."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoseg.experiment.settings import check_same_settings
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import read_tensor_file, write_tensors

logger = logging.getLogger(__name__)
_FILE, _DONE = "sums.safetensors", "done"
_EVERY = 60.0  # seconds


class SumsCheckpoint:
    """Saved sums of a run folder, and the settings that they depend on.

    Args:
        folder: the run folder.
        record: name of the file in it that holds the settings.
        settings: the current settings.
        writes: whether this rank writes files.

    Raises:
        UserError: the folder's sums were made under other settings.
    """

    def __init__(self, folder: Path, record: str, settings: Mapping[str, Any], *, writes: bool = True) -> None:
        self._path, self._saved = folder / _FILE, time.monotonic()
        note = folder / record
        try:
            before = forms.read_json(note, forms.table(forms.plain))
        except FileNotFoundError:
            before = None
        except forms.SchemaError as error:
            raise UserError(f"{note} is damaged ({error}). Choose another hydra.run.dir.") from None
        if before is not None:
            check_same_settings(folder, before, settings, key="hydra.run.dir")
        elif writes:
            write_json(note, dict(settings))

    @property
    def due(self) -> bool:
        """Return whether it is time to save the sums."""
        return time.monotonic() - self._saved >= _EVERY

    def load(self, sums: Mapping[str, Tensor]) -> int:
        """Fill sums by name with the saved ones; return the number of images they cover, 0 if none are valid."""
        if not self._path.exists():
            return 0
        try:
            saved = read_tensor_file(self._path, _FILE)
        except UserError as error:
            saved = {}
            logger.warning("%s Its sums start over.", error)
        wanted = {**sums, _DONE: torch.tensor(0)}
        is_compatible = {name: (value.shape, value.dtype) for name, value in saved.items()} == {
            name: (value.shape, value.dtype) for name, value in wanted.items()
        }
        if not is_compatible or saved[_DONE] < 1 or not all(torch.isfinite(value).all() for value in saved.values()):
            return 0
        for name, value in sums.items():
            value.copy_(saved[name])
        logger.info("resuming with the sums of %d images in %s", saved[_DONE], self._path)
        return int(saved[_DONE])

    def save(self, sums: Mapping[str, Tensor], done: int) -> None:
        """Save the sums over the first `done` images."""
        write_tensors(self._path, {**sums, _DONE: torch.tensor(done)}, {})
        self._saved = time.monotonic()

    def drop(self) -> None:
        """Remove the saved sums, which are no longer needed."""
        self._path.unlink(missing_ok=True)
