"""Logger that sends values to an MLflow server."""

import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.loggers.remote import RemoteLogger
from dinoseg.report.loggers.logger import Status
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Positive
from dinoseg.utils.wording import without_credentials

_GROUP = "group"  # tag that holds the group
_WEB = ("http://", "https://")
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # of a request
_MAX_TEXT = 6000  # characters of a parameter
_REFUSED = re.compile(r"[^\w/.\- ]")  # characters that MLflow allows in no name
_REFUSED_OF_IMAGES = re.compile(_REFUSED.pattern, re.ASCII)
_MAX_NAME, _MAX_IMAGE_NAME = 250, 120  # characters; an image's file name also holds its step, time and an id
_DEFAULTS = {  # read by MLflow from the environment, where a user may set others
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print the credentials of a URL
}


class MlflowLogger(RemoteLogger):
    """Send to a run of an MLflow server.

    Credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.

    Args:
        out_dir: the run folder.
        start_step: steps done before; MLflow keeps values of later steps.
        experiment: name of the experiment, which is created if it does not exist.
        tracking_uri: address of the server, or what else MLflow accepts; None: MLFLOW_TRACKING_URI.
        tags: of the run, by name.
        group: see `RemoteLogger`; becomes the tag `group`.
        artifacts: see `RemoteLogger`.
        timeout: see `RemoteLogger`.

    Raises:
        UserError: no address is set.
    """

    package = "mlflow"

    def __init__(
        self,
        out_dir: Path,
        *,
        start_step: int = 0,
        experiment: str = "dinoseg",
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        group: str | None = None,
        artifacts: bool = False,
        timeout: Positive = 30.0,
    ) -> None:
        super().__init__(out_dir, group=group, artifacts=artifacts, timeout=timeout)
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise UserError(
                "logger=mlflow needs a server or a file. Set logger.mlflow.tracking_uri=http://HOST:PORT (or "
                "sqlite:///mlflow.db), or MLFLOW_TRACKING_URI."
            )
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of each retry
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, round(timeout))))
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri)
        self._uri, self._experiment, self._tags = uri, experiment, dict(tags or {})

    def open_run(self, run_id: str | None, settings: Mapping[str, Any]) -> str:
        """Continue the run if the server has it, or start one; the settings are its parameters, which never change."""
        run = self._find_run(run_id)
        if run is None:
            tags = {_name(key): str(value) for key, value in self._tags.items()}
            tags |= {_GROUP: self.group} if self.group else {}
            run = self._client.create_run(self._experiment_id(), run_name=self.run_name, tags=tags)
            from mlflow.entities import Param

            params = [Param(_name(key), str(value)[:_MAX_TEXT]) for key, value in settings.items()]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(run.info.run_id, params=params[start : start + _MAX_PARAMS])
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        path = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        uri = without_credentials(self._uri)
        if uri.startswith(_WEB):
            self.view = f"MLflow:       {uri.rstrip('/')}/{path}"
        else:
            self.view = f"MLflow:       mlflow ui --backend-store-uri {shlex.quote(uri)}, then open /{path}"
        return run.info.run_id

    def send_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values as metrics, in as few requests as the server allows."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(_name(key), value, now, step) for key, value in values.items()]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS])

    def send_images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Upload images, which MLflow shows by step."""
        for name, rgb in named.items():
            self._client.log_image(self.run_id, rgb, key=_image_name(name), step=step, synchronous=True)

    def send_scores(self, values: Mapping[str, float]) -> None:
        """Send the scores as metrics of the last step."""
        self.send_scalars(self.last_step, values)

    def send_checkpoint(self, path: Path) -> None:
        """Upload the file to the folder `checkpoints` of the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path), "checkpoints")

    def close(self, *, status: Status = "finished") -> None:
        """End the run with the status FINISHED, FAILED or KILLED."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id, status=status.upper())

    def _find_run(self, run_id: str | None) -> Any:
        """Return a run of the server; None if there is none."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run and run.info.lifecycle_stage == "active" else None

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        try:
            return found.experiment_id if found else self._client.create_experiment(self._experiment)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another job of a sweep, in between
                raise
        return self._client.get_experiment_by_name(self._experiment).experiment_id


def _name(name: str, refused: re.Pattern[str] = _REFUSED, most: int = _MAX_NAME) -> str:
    """Return a name that MLflow accepts.

    Refused characters become underscores, a part that is empty or of dots alone begins with one, and a long name is
    cut. A changed name ends in a hash of the original, so that different names stay different.
    """
    clean = "/".join(part if part.strip(".") else f"_{part}" for part in refused.sub("_", name).split("/"))
    clean = f"_{clean}" if clean.startswith("..") else clean
    if clean == name and len(name) <= most:
        return name
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{clean[: most - len(digest) - 1]}_{digest}"


def _image_name(name: str) -> str:
    """Return a name that MLflow accepts for an image: of ASCII characters, and shorter."""
    return _name(name, _REFUSED_OF_IMAGES, _MAX_IMAGE_NAME)
