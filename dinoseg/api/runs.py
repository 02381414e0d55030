"""Finished and interrupted trainings as Python objects."""

import base64
import io
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinoseg.api.jobs import run_mode
from dinoseg.api.results import Results, Scores, html_table, label_of, shown_value
from dinoseg.checkpoints.run_config import BROKEN, read_config
from dinoseg.evaluation.run_facts import EVALUATION
from dinoseg.report.log import read_rows
from dinoseg.runs.folder import last_command_line
from dinoseg.segmenter.load import load
from dinoseg.segmenter.model import Model
from dinoseg.training import checkpoint
from dinoseg.training.description import resolve_score
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import check_annotations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = ("miou", "dice", "accuracy", "fg_ari")


class Run:
    """A training run, by its folder. Properties read the files as they are now, also of a run in progress.

    Args:
        folder: of a training, such as outputs/demo/train_2026-01-31_12-00-00.

    Attributes:
        folder: the run folder, absolute.

    Raises:
        UserError: the folder holds no run.

    Examples:
        >>> import dinoseg
        >>> run = dinoseg.Run("outputs/demo/train")
        >>> run.load_model().classes[:2]
        ('Background', 'Tool Clasper')
        >>> run.metrics["train/loss"].shape == run.metrics["step"].shape
        True
    """

    @check_annotations
    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        if not (self.folder / "config/config.yaml").is_file():
            raise UserError(
                f"{folder} is not a run folder: config/config.yaml is missing. Give a folder of mode=train."
            )

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def config(self) -> dict[str, Any]:
        """The config of the newest command as nested dicts; interpolations such as `${data.num_classes}` stay text.

        Raises:
            UserError: the file is damaged.
        """
        files = self.folder.glob("config*/config.yaml")
        path = max(files, key=lambda path: path.stat().st_mtime_ns)
        try:
            return read_config(path)
        except BROKEN as error:
            raise UserError(f"{path} is not a config ({error}). Choose another run.") from None

    @property
    def overrides(self) -> list[str]:
        """The words of the newest command, such as `trainer.steps=20`."""
        return last_command_line(self.folder)

    @property
    def scores(self) -> Scores | None:
        """Scores of the best checkpoint on the validation split; None before the end of the training."""
        folders = (self.folder / EVALUATION, self.folder)  # the latter of mode=eval
        return next((Scores.read(folder) for folder in folders if (folder / "scores.json").is_file()), None)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Columns of metrics.jsonl by name, such as `step` and `train/loss`; NaN where a row has no value.

        `pandas.DataFrame(run.metrics)` is a table of them.
        """
        rows = self._rows
        names = dict.fromkeys(["step", *(name for row in rows for name in row)])
        columns = {name: [row.get(name) for row in rows] for name in names}
        return {name: np.array(each, dtype=np.int64 if name == "step" else float) for name, each in columns.items()}

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint that the run is evaluated with; None before the first validation.

        It has the best validation score, or with `trainer.evaluate=last` the newest one.
        """
        return self._checkpoint("best")

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, from which the run resumes; None before it is written."""
        return self._checkpoint("last")

    @property
    def step(self) -> int:
        """The number of optimizer steps in the newest checkpoint."""
        last = self.last_checkpoint
        return 0 if last is None else int(checkpoint.describe(last)["progress"]["step"])

    def plot(self) -> "Figure":
        """Return a matplotlib figure of the curves of loss and scores; a star marks the best checkpoint."""
        from dinoseg.report.curves import curves_figure  # imports matplotlib, which no training step needs

        best = self.best_checkpoint
        step = 0 if best is None else int(checkpoint.describe(best)["progress"]["best_step"])
        return curves_figure(self._rows, resolve_score(self.config), step)

    @check_annotations
    def load_model(self, which: str = "best", **options: Any) -> Model:
        """Return the trained model.

        Args:
            which: best or last checkpoint.
            options: of `dinoseg.load`, such as `device`.

        Raises:
            UserError: the checkpoint does not exist, or it cannot be loaded.
        """
        path = {"best": self.best_checkpoint, "last": self.last_checkpoint}.get(which)
        if path is None:
            raise UserError(
                f"which={which!r}: {self.folder} lacks this checkpoint. Choose best or last, once it is validated."
            )
        return load(path, **options)

    def resume(self, *words: str, config_dir: str | PathLike[str] | None = None, **overrides: Any) -> "Run":
        """Resume the training in its folder, see `dinoseg.train`; `trainer={"steps": 200}` extends it.

        Raises:
            UserError: any error that the user can fix.
            KeyboardInterrupt: on Ctrl-C; the last complete step is saved.
        """
        run_mode("train", words, overrides, config_dir=config_dir, given={"resume": self})
        return Run(self.folder)

    def export(
        self,
        format: str = "safetensors",
        *words: str,
        out_dir: str | PathLike[str] | None = None,
        exist_ok: bool = False,
        config_dir: str | PathLike[str] | None = None,
        **overrides: Any,
    ) -> Results:
        """Export the best checkpoint to a file, and verify it; return the files.

        Args:
            format: option of the group `export`: safetensors, onnx, program or backbone.
            words: overrides as typed on the command line.
            out_dir: the run folder of the export.
            exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
            config_dir: folder of further config groups.
            overrides: config groups and keys, as of `dinoseg.train`.

        Raises:
            UserError: any error that the user can fix.
        """
        given = {"resume": self, "export": format}
        return Results.of(run_mode("export", words, overrides, out_dir, exist_ok, config_dir, given=given))

    def __repr__(self) -> str:
        scores = "".join(f", {label_of(name)} {value}" for name, value in self._shown_scores.items())
        return f"Run({str(self.folder)!r}, step {self.step}{scores})"

    def _repr_html_(self) -> str:
        paths = {"folder": self.folder, "best": self.best_checkpoint, "last": self.last_checkpoint}
        named = {"step": self.step, **self._shown_scores, **{name: each for name, each in paths.items() if each}}
        table = html_table(["Run", ""], [[label_of(name), value] for name, value in named.items()])
        if not self._rows:
            return table
        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png")
        return f'{table}<img alt="curves" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'

    @property
    def _rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return read_rows(path) if path.is_file() else []

    @property
    def _shown_scores(self) -> dict[str, str]:
        scores: Mapping[str, Any] = self.scores or {}
        return {name: shown_value(name, scores[name]) for name in _SHOWN if name in scores}

    def _checkpoint(self, name: str) -> Path | None:
        path = self.folder / checkpoint.CHECKPOINT_FOLDER / f"{name}.safetensors"
        return path if path.is_file() else None
