"""Logger that sends values to Weights & Biases."""

import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.report.loggers.remote import RemoteLogger
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Positive
from dinoseg.utils.urls import without_credentials

_STEP = "step"  # value that holds the training step: W&B's own step counts rows and never goes back


class WandbLogger(RemoteLogger):
    """Send to a run of Weights & Biases; offline, write it to `out_dir`/wandb.

    The API key comes from WANDB_API_KEY or `wandb login`, the address of a server from WANDB_BASE_URL.

    Args:
        out_dir: the run folder.
        start_step: steps done before; W&B keeps values of later steps.
        project: name of the project.
        entity: user or team; None: the account's default.
        mode: online or offline; None: WANDB_MODE, or online.
        tags: labels of the run.
        group: see `RemoteLogger`.
        artifacts: see `RemoteLogger`.
        timeout: see `RemoteLogger`.

    Raises:
        UserError: another mode is set, or the mode is online and no API key is set.
    """

    package = "wandb"

    def __init__(
        self,
        out_dir: Path,
        *,
        start_step: int = 0,
        project: str = "dinoseg",
        entity: str | None = None,
        mode: str | None = None,
        tags: Sequence[str] = (),
        group: str | None = None,
        artifacts: bool = False,
        timeout: Positive = 30.0,
    ) -> None:
        super().__init__(out_dir, group=group, artifacts=artifacts, timeout=timeout)
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.mode = mode or wandb.setup().settings.mode
        if self.mode not in ("online", "offline"):
            raise UserError(
                f"logger.wandb.mode={self.mode} (or WANDB_MODE) must be online or offline. Set one, or leave wandb out "
                "of `logger`."
            )
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "logger=wandb needs an API key. Run `wandb login`, set WANDB_API_KEY, or add logger.wandb.mode=offline."
            )
        self._run_options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "tags": list(tags),
            "mode": self.mode,
        }
        self._run: Any = None

    def open_run(self, run_id: str | None, settings: Mapping[str, Any]) -> str:
        """Continue the run, or start one with an id of eight characters."""
        import wandb

        # git: a remote's URL may hold a token. console: the run folder has the log.
        options = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            init_timeout=self.timeout,
            finish_timeout=self.timeout,
            finish_timeout_raises=True,
        )
        self._run = wandb.init(
            dir=str(self.out_dir.absolute()),
            id=run_id or secrets.token_hex(4),
            name=self.run_name,
            group=self.group,
            resume="allow",
            reinit="create_new",
            settings=options,
            **self._run_options,
        )
        self._run.config.update(dict(settings), allow_val_change=True)
        self._run.define_metric("*", step_metric=_STEP)
        if self._run.url:
            self.view = f"W&B:          {without_credentials(self._run.url)}"
        else:
            # a run that was resumed offline has a folder for each start, named by its time
            folders = sorted(Path(self._run.dir).parents[1].glob(f"offline-run-*-{self._run.id}"))
            self.view = f"W&B:          wandb sync {shlex.join(map(str, folders))}"
        return self._run.id

    def send_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row."""
        self._run.log({_STEP: step, **values})

    def send_images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Write a row of images."""
        import wandb

        self._run.log({_STEP: step, **{name: wandb.Image(rgb) for name, rgb in named.items()}})

    def send_scores(self, values: Mapping[str, float]) -> None:
        """Write the scores into the summary of the run."""
        self._run.summary.update(dict(values))

    def send_checkpoint(self, path: Path) -> None:
        """Upload the file as an artifact of type model, named by the run."""
        import wandb

        artifact = wandb.Artifact(f"{self._run.id}-best", type="model")
        artifact.add_file(str(path), policy="immutable")  # not copied before the upload
        self._run.log_artifact(artifact)

    def close(self, *, failed: bool = False) -> None:
        """Finish the run, with the exit code 1 if it failed.

        Raises:
            TimeoutError: the server has not received everything within `timeout` seconds.
        """
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
