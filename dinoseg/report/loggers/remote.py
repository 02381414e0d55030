"""Base class of loggers that send values to an experiment tracker, and the record of the tracked run."""

from importlib.util import find_spec
from pathlib import Path

from dinoseg.report.loggers.logger import Logger
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

_SWEEP = "multirun.yaml"  # in the folder of a sweep
_MAX_BYTES = 2**20  # of a record, which has about 60
_RECORD = forms.record(id=forms.text, step=forms.whole(least=-1))


class RemoteLogger(Logger):
    """Logger of an experiment tracker, which continues the tracked run of a run folder.

    `out_dir`/PACKAGE.json stores the id of the tracked run and the last step that was sent. Trackers only append, so a
    resumed run does not send the steps again that it logged before.

    Args:
        out_dir: the run folder.
        group: of the tracked run; None: the sweep that the run belongs to.

    Attributes:
        package: of the tracker; also its option of `logger` and its extra.
        run_name: name of the tracked run: that of the run folder, within its sweep.
        group: None for a single run.
        run_id: id of the tracked run; None: not opened yet.
    """

    package = ""

    def __init__(self, out_dir: Path, *, group: str | None) -> None:
        self.run_name, sweep = _find_name(out_dir.absolute())
        self.group = group or sweep
        self._record = out_dir / f"{self.package}.json"
        self.run_id: str | None = None
        self._sent_step = -1  # by an earlier start of the run
        if self._record.exists():
            try:
                stored = forms.read_json(self._record, _RECORD, most=_MAX_BYTES)
            except forms.SchemaError as error:
                raise ValueError(f"{self._record}: {error}. Remove it to start a new tracked run") from None
            self.run_id = stored["id"]
            self._sent_step = stored["step"]

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

    def store_run(self, run_id: str) -> None:
        """Store the id of the tracked run, which a resumed run continues."""
        self.run_id = run_id
        write_json(self._record, {"id": run_id, "step": self._sent_step})

    def is_new(self, step: int) -> bool:
        """Return whether no earlier start of the run has sent a step, and store that it is sent now."""
        if step <= self._sent_step:
            return False
        write_json(self._record, {"id": self.run_id, "step": step})
        return True


def _find_name(folder: Path) -> tuple[str, str | None]:
    """Return the name of the tracked run of a run folder, and its group."""
    for parent in [*folder.parents][:2]:  # hydra.sweep.subdir may have two levels
        if (parent / _SWEEP).is_file():
            return f"{parent.name}/{folder.relative_to(parent).as_posix()}", parent.name
    return folder.name, None
