"""Logger that sends values to an MLflow server."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.report.loggers.logger import Status
from dinoseg.report.loggers.remote import RemoteLogger
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Positive
from dinoseg.utils.urls import without_credentials

_REFUSED = re.compile(r"[^\w/.\- ]")  # characters that MLflow allows in no name
_MAX_NAME = 120  # characters: the file name of an image also holds its step, time and an id
_DEFAULTS = {  # read by MLflow from the environment, where a user may set others
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # its errors are exceptions, too
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
        artifacts: whether to upload the best checkpoint.
        timeout: seconds that a request may take; MLflow sends it again twice.

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
        super().__init__(out_dir, group=group)
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise UserError(
                "logger=mlflow needs a server. Set logger.mlflow.tracking_uri=http://HOST:PORT or MLFLOW_TRACKING_URI."
            )
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, round(timeout))))
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of each retry
        import mlflow

        self._mlflow: Any = mlflow
        self._uri = uri
        self._experiment = experiment
        self._tags = {_clean_name(key): str(value) for key, value in (tags or {}).items()}
        if self.group:
            self._tags["group"] = self.group
        self._artifacts = artifacts
        self._request: Any = None  # the last row, which MLflow sends from a thread
        self._is_open = False

    def config(self, settings: Mapping[str, Any]) -> None:
        """Continue the run, or start one with the settings as parameters, which never change."""
        self._mlflow.set_tracking_uri(self._uri)
        self._mlflow.set_experiment(self._experiment)
        run = self._mlflow.start_run(self.run_id, run_name=self.run_name, tags=self._tags)
        self._is_open = True
        if self.run_id is None:
            self._mlflow.log_params({_clean_name(key): value for key, value in settings.items()})
        self.store_run(run.info.run_id)
        path = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        self.view = f"MLflow:       {without_credentials(self._uri).rstrip('/')}/{path}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values as metrics once the row before has arrived."""
        if self.is_new(step):
            self._wait()
            named = {_clean_name(key): value for key, value in values.items()}
            self._request = self._mlflow.log_metrics(named, step, synchronous=False)

    def images(self, step: int, named: Mapping[str, np.ndarray]) -> None:
        """Upload images as `validation/NAME`, which MLflow shows by step."""
        if self.is_new(step):
            for name, rgb in named.items():
                key = f"validation/{name}".encode("ascii", "backslashreplace").decode()
                self._mlflow.log_image(rgb, key=_clean_name(key), step=step, synchronous=True)

    def scores(self, values: Mapping[str, float]) -> None:
        """Send the scores as metrics."""
        self._mlflow.log_metrics({_clean_name(key): value for key, value in values.items()}, synchronous=True)

    def checkpoint(self, path: Path) -> None:
        """Upload the file to the folder `checkpoints` of the run's artifacts."""
        if self._artifacts:
            self._mlflow.log_artifact(str(path), "checkpoints")

    def close(self, *, status: Status = "finished") -> None:
        """End the run with the status FINISHED, FAILED or KILLED."""
        if self._is_open:
            self._is_open = False
            self._mlflow.end_run(status.upper())
            self._wait()

    def _wait(self) -> None:
        """Wait for the last row, and raise its error."""
        if self._request is not None:
            self._request.wait()


def _clean_name(name: str) -> str:
    """Return a name that MLflow accepts: short, and with underscores for the characters that it refuses.

    A changed name ends in a hash of the original, so that different names stay different.
    """
    clean = _REFUSED.sub("_", name)
    if clean == name and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{clean[: _MAX_NAME - 9]}_{digest}"
