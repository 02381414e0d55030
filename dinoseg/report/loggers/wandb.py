"""Logger that sends values to Weights & Biases."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.report.loggers.logger import Status
from dinoseg.report.loggers.remote import RemoteLogger
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Positive
from dinoseg.utils.urls import without_credentials
from dinoseg.utils.wording import format_value

_STEP = "step"  # value that holds the training step: W&B's own step counts rows and never goes back


class WandbLogger(RemoteLogger):
    """Send to a run of Weights & Biases; offline, write it to `out_dir`/wandb.

    The API key comes from WANDB_API_KEY or `wandb login`, the address of a server from WANDB_BASE_URL. WANDB_NAME
    replaces the name of the run folder. W&B sends from a process of its own, which waits for a server.

    Args:
        out_dir: the run folder.
        start_step: steps done before; W&B keeps values of later steps.
        project: name of the project; None: WANDB_PROJECT, or dinoseg.
        entity: user or team; None: the account's default.
        mode: online, offline, or disabled, which logs nothing; None: WANDB_MODE, or online.
        tags: labels of the run; empty: WANDB_TAGS, separated by commas.
        group: see `RemoteLogger`.
        artifacts: whether to upload the best checkpoint.
        timeout: seconds to open the run, and to send the last values.

    Raises:
        UserError: W&B does not accept a setting, or the mode is online and no API key is set.
    """

    package = "wandb"

    def __init__(
        self,
        out_dir: Path,
        *,
        start_step: int = 0,
        project: str | None = None,
        entity: str | None = None,
        mode: str | None = None,
        tags: Sequence[str] = (),
        group: str | None = None,
        artifacts: bool = False,
        timeout: Positive = 30.0,
    ) -> None:
        super().__init__(out_dir, group=group)
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb: Any = wandb
        self._run: Any = None
        self._artifacts = artifacts
        try:
            environment = wandb.setup().settings
            # git: a remote's URL may hold a token. console: the run folder has the log.
            self._settings = wandb.Settings(
                project=project or environment.project or "dinoseg",
                entity=entity or environment.entity,
                mode=mode or environment.mode,  # type: ignore[arg-type]
                run_id=self.run_id,
                run_name=environment.run_name or self.run_name,
                run_group=self.group,
                run_tags=tuple(map(str, tags)) or environment.run_tags,
                root_dir=str(out_dir.absolute()),
                resume="allow",
                reinit="create_new",
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                init_timeout=timeout,
                finish_timeout=timeout,
                finish_timeout_raises=True,
            )
        except (wandb.errors.UsageError, ValueError) as error:
            message = format_value(str(error), 300)
            raise UserError(f"W&B refuses a key of logger.wandb or a WANDB_ variable. Correct it: {message}") from None
        if self._settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "logger=wandb needs an API key. Run `wandb login`, set WANDB_API_KEY, or add logger.wandb.mode=offline."
            )

    def config(self, settings: Mapping[str, Any]) -> None:
        """Continue the run, or start one."""
        self._run = self._wandb.init(settings=self._settings)
        self.store_run(self._run.id)
        self._run.config.update(dict(settings), allow_val_change=True)
        self._run.define_metric("*", step_metric=_STEP)
        if self._settings.mode == "offline":
            # a run that was resumed offline has a folder for each start
            folders = f"{shlex.quote(str(Path(self._run.dir).parents[1]))}/offline-run-*-{self._run.id}*"
            self.view = f"W&B:          wandb sync {folders}"
        elif self._run.url:
            self.view = f"W&B:          {without_credentials(self._run.url)}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row."""
        if self.is_new(step):
            self._run.log({_STEP: step, **values})

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Write a row of images as `validation/NAME`."""
        if self.is_new(step):
            images = {f"validation/{name}": self._wandb.Image(rgb) for name, rgb in named.items()}
            self._run.log({_STEP: step, **images})

    def scores(self, values: Mapping[str, float]) -> None:
        """Write the scores into the summary of the run."""
        self._run.summary.update(dict(values))

    def checkpoint(self, path: Path) -> None:
        """Upload the file as an artifact of type model, named by the run."""
        if self._artifacts:
            artifact = self._wandb.Artifact(f"{self._run.id}-best", type="model")
            artifact.add_file(str(path), policy="immutable")  # not copied before the upload
            self._run.log_artifact(artifact)

    def close(self, *, status: Status = "finished") -> None:
        """Finish the run, with the exit code 1 unless the training finished.

        Raises:
            TimeoutError: the server has not received everything within `timeout` seconds.
        """
        if self._run is not None:
            self._run.finish(exit_code=int(status != "finished"))
