"""Logger that sends values to Weights & Biases."""

import logging
import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.loggers.remote import RemoteLogger
from dinoseg.report.loggers.logger import Status
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Positive
from dinoseg.utils.wording import format_text, format_value, without_credentials

logger = logging.getLogger(__name__)
_PROJECT = "dinoseg"  # if neither the config nor the environment names one
_REFUSED = re.compile(r"[/\\#?%:]")  # characters that W&B allows in no name of a project
_MAX_PROJECT, _MAX_TAG = 128, 64  # characters
_STEP = "step"  # value that holds the training step: W&B's own step counts rows and never goes back


def _check_names(project: str, tags: Sequence[str]) -> None:
    """Refuse a project or tags that W&B does not accept; it would raise an error in the middle of the training.

    Raises:
        UserError: naming the value and the rule.
    """
    if len(project) > _MAX_PROJECT or _REFUSED.search(project):
        raise UserError(
            f"logger.wandb.project={format_text(project)} is not a name of a W&B project: use at most {_MAX_PROJECT} "
            "characters, without / \\ # ? % :"
        )
    for tag in tags:
        if not 1 <= len(str(tag)) <= _MAX_TAG:
            raise UserError(
                f"logger.wandb.tags has {format_value(str(tag))} of {len(str(tag))} characters: use 1 to {_MAX_TAG}."
            )


class WandbLogger(RemoteLogger):
    """Send to a run of Weights & Biases; offline, write it to `out_dir`/wandb.

    The API key comes from WANDB_API_KEY or `wandb login`, the address of a server from WANDB_BASE_URL. WANDB_NAME
    replaces the name of the run folder; in a sweep, that of the whole: `WANDB_NAME/0`.

    Args:
        out_dir: the run folder.
        start_step: steps done before; W&B keeps values of later steps.
        project: name of the project; None: WANDB_PROJECT, or dinoseg.
        entity: user or team; None: the account's default.
        mode: online, offline, or disabled, which logs nothing; None: WANDB_MODE, or online.
        tags: labels of the run; empty: WANDB_TAGS, separated by commas.
        group: see `RemoteLogger`.
        artifacts: see `RemoteLogger`.
        timeout: see `RemoteLogger`.

    Raises:
        UserError: another mode is set, W&B does not accept the project or a tag, or the mode is online and no API key
            is set.
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
        super().__init__(out_dir, group=group, artifacts=artifacts, timeout=timeout)
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        try:
            settings = wandb.setup().settings  # with those of the environment
        except (wandb.errors.UsageError, ValueError) as error:
            raise UserError(f"wandb refuses a WANDB_ variable. Correct it: {format_text(str(error), 300)}") from None
        self.mode = mode or settings.mode
        if self.mode == "disabled":
            logger.info("logger=wandb logs nothing: logger.wandb.mode or WANDB_MODE is disabled.")
            self.is_enabled = False
            return
        if self.mode not in ("online", "offline"):
            raise UserError(
                f"logger.wandb.mode={self.mode} (or WANDB_MODE) must be online, offline or disabled. Set one, or leave "
                "wandb out of `logger`."
            )
        project = project or settings.project or _PROJECT
        _check_names(project, tags)
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "logger=wandb needs an API key. Run `wandb login`, set WANDB_API_KEY, or add logger.wandb.mode=offline."
            )
        self._run_options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "tags": [str(tag) for tag in tags] or None,
            "name": "/".join([settings.run_name, *self.run_name.split("/")[1:]])
            if settings.run_name
            else self.run_name,
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
            # a run that was resumed offline has a folder for each start, named by its time; in the same second, -1, -2
            named = re.compile(rf"offline-run-\d+_\d+-{re.escape(self._run.id)}(-\d+)?")
            folders = sorted(path for path in Path(self._run.dir).parents[1].iterdir() if named.fullmatch(path.name))
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

    def close(self, *, status: Status = "finished") -> None:
        """Finish the run, with the exit code 1 unless the training finished.

        Raises:
            TimeoutError: the server has not received everything within `timeout` seconds.
        """
        if self._run is not None:
            self._run.finish(exit_code=int(status != "finished"))
