"""Base class of loggers that send values to an experiment tracker, and the record of the tracked run."""

import math
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.report.loggers.logger import Logger
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import is_sweep_folder
from dinoseg.utils.wording import format_value

_RUN_ID = re.compile(r"[\w-]{1,64}", re.ASCII)  # it becomes part of URLs and of names of folders


def _run_id(value: Any, where: str) -> None:
    """Check that a value is the id of a tracked run."""
    if not (isinstance(value, str) and _RUN_ID.fullmatch(value)):
        raise forms.SchemaError(f"{where} is {format_value(value, 60)}; it must be 1 to 64 letters, digits, _ and -")


_RECORD = forms.record(id=forms.maybe(_run_id), logged=forms.table(forms.whole()))


class RemoteLogger(Logger):
    """Logger of an experiment tracker: continues the tracked run of a run folder, and sends each value once.

    `out_dir`/PACKAGE.json stores the id of the tracked run, and the last step of each value that was sent. Trackers
    only append, so values that a resumed run logs again are not sent again.

    A subclass defines `open_run` and the `send_` methods. They run in the background; see `BackgroundLogger`.

    Args:
        out_dir: the run folder.
        group: of the tracked run; None: the sweep that the run belongs to.
        artifacts: whether to send the best checkpoint.
        timeout: seconds in which the tracker has to answer, and to receive the last values.

    Attributes:
        package: of the tracker; also its option of `logger` and its extra.
        run_name: name of the tracked run: that of the run folder, within its sweep.
        group: None for a single run.
        run_id: id of the tracked run; None: not opened yet.
    """

    package = ""

    def __init__(self, out_dir: Path, *, group: str | None, artifacts: bool, timeout: float) -> None:
        if not 0 < timeout < math.inf:  # for loggers of other packages, whose annotations are not checked
            raise UserError(f"logger.{self.package}.timeout={timeout}: give seconds above 0.")
        self.out_dir, self.artifacts = out_dir, artifacts
        self.timeout: float = timeout
        self.run_name, found = _place(out_dir.absolute())
        self.group = group or found
        self._path = out_dir / f"{self.package}.json"
        self._logged: dict[str, int] = {}
        self.run_id: str | None = None
        if self._path.exists():
            try:
                record = forms.read_json(self._path, _RECORD)
            except forms.SchemaError as error:
                raise ValueError(f"{self._path}: {error}. Remove it to start a new tracked run") from None
            self.run_id, self._logged = record["id"], record["logged"]

    @classmethod
    def check_installed(cls) -> None:
        """Refuse a package that is not installed."""
        spec = find_spec(cls.package)
        # a folder of this name, such as the one that wandb writes, has no origin
        if spec is None or spec.origin is None:
            raise UserError(
                f"logger={cls.package} needs {cls.package}, which is not installed: in your clone of dinoseg, pip "
                f"install '.[{cls.package}]'"
            )

    @property
    def last_step(self) -> int:
        """Return the last step of any value that was sent; 0: none was."""
        return max(self._logged.values(), default=0)

    def config(self, settings: Mapping[str, Any]) -> None:
        """Open the tracked run and send the settings."""
        run_id = self.open_run(self.run_id, settings)
        if run_id != self.run_id:
            self.run_id, self._logged = run_id, {}
        self._store()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values that were not sent before."""
        self._send(step, values, self.send_scalars)

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Send the images that were not sent before, as `validation/NAME`."""
        self._send(step, {f"validation/{name}": rgb for name, rgb in named.items()}, self.send_images)

    def scores(self, values: Mapping[str, Any]) -> None:
        """Send each score that is a number as `final/NAME`."""
        self.send_scores({f"final/{key}": value for key, value in values.items() if isinstance(value, float)})

    def checkpoint(self, path: Path) -> None:
        """Send the best checkpoint if `artifacts` is set."""
        if self.artifacts:
            self.send_checkpoint(path)

    def open_run(self, run_id: str | None, settings: Mapping[str, Any]) -> str:
        """Continue the tracked run, or start one, and return its id.

        Args:
            run_id: of the run to continue; None for a new one.
            settings: of the run, by dotted name.
        """
        raise NotImplementedError

    def send_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send finite values of a step."""
        raise NotImplementedError

    def send_images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Send images (H, W, 3) uint8 of a step."""
        raise NotImplementedError

    def send_scores(self, values: Mapping[str, float]) -> None:
        """Send final scores; a resumed run sends them again, and the last ones count."""
        raise NotImplementedError

    def send_checkpoint(self, path: Path) -> None:
        """Upload a file."""
        raise NotImplementedError

    def _send(self, step: int, named: Mapping[str, Any], send: Callable[[int, Mapping[str, Any]], None]) -> None:
        """Send those values or images that this run has not sent for the step, and record the step."""
        new = {name: value for name, value in named.items() if step > self._logged.get(name, -1)}
        if new:
            send(step, new)
            self._logged |= dict.fromkeys(new, step)
            self._store()

    def _store(self) -> None:
        write_json(self._path, {"id": self.run_id, "logged": self._logged})


def _place(folder: Path) -> tuple[str, str | None]:
    """Return the name of the tracked run of a run folder, and its group."""
    for parent in [*folder.parents][:2]:  # hydra.sweep.subdir may have two levels
        if is_sweep_folder(parent):
            return f"{parent.name}/{folder.relative_to(parent).as_posix()}", parent.name
    return folder.name, None
