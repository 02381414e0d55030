"""mode=app: browser app that segments images and clips, and tracks painted objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.experiment.source import ModelSource
from dinoseg.experiment.trackers import tracker_factory
from dinoseg.serving.app import App
from dinoseg.serving.guard import Hosts
from dinoseg.serving.jobs import uploads_folder
from dinoseg.serving.limits import ClipLimits, Limits, Port
from dinoseg.serving.server import serve_until_signal
from dinoseg.serving.source import tracker_maker
from dinoseg.serving.start import started
from dinoseg.utils.ranges import Count, NotNegative


def app(
    cfg: DictConfig,
    *,
    out_dir: Path,
    model: str | None,
    host: str,
    port: Port,
    hosts: Sequence[str],
    batch_size: Count | None,
    wait_ms: NotNegative,
    limits: Limits,
    clips: ClipLimits,
) -> dict[str, Any]:
    """Serve the app, and the endpoint of mode=serve, until SIGINT or SIGTERM.

    Raises:
        UserError: there is no model, the port is taken, or `hosts` or `cfg.tracker` are invalid.
    """
    known, run = Hosts.of(host, hosts), Path(out_dir)
    make_tracker = tracker_factory(cfg.tracker, f"tracker={cfg.choices.tracker}")
    with (
        uploads_folder(run) as uploads,
        started(
            ModelSource(cfg),
            run,
            model=model,
            host=host,
            port=port,
            batch_size=batch_size,
            wait_ms=wait_ms,
            limits=limits,
        ) as (listener, service),
    ):
        made = App(service, clips, uploads, tracker_maker(make_tracker, service.model))
        serve_until_signal(made.application(known), listener, service.announce_stop, patience=limits.patience)
    print("stopped: all uploads are removed")
    return {"run": str(out_dir)}
