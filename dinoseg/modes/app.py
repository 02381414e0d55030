"""mode=app: a page in the browser that segments pictures and clips, and follows what is painted."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.nodes import instantiate
from dinoseg.ranges import Count, NotNegative
from dinoseg.runs.trained import Trained
from dinoseg.serving.app import App
from dinoseg.serving.guard import hosts_of
from dinoseg.serving.limits import ClipLimits, Limits, Port
from dinoseg.serving.server import bound, serve_until_signal
from dinoseg.serving.service import Service
from dinoseg.serving.source import load_served
from dinoseg.tracking.propagation.tracker import PropagationTracker


def app(
    cfg: DictConfig,
    *,
    out_dir: Path,
    host: str,
    port: Port,
    hosts: Sequence[str],
    batch_size: Count,
    wait_ms: NotNegative,
    limits: Limits,
    clips: ClipLimits,
) -> dict[str, Any]:
    """Serve the app, and the endpoint of mode=serve beside it, until SIGINT or SIGTERM.

    Raises:
        UserError: there is no trained model, or the port is taken.
    """
    with bound(host, port) as listener, TemporaryDirectory(dir=out_dir, prefix="uploads_") as uploads:
        model, trained = load_served(cfg, Path(out_dir))
        service = Service(model, limits, batch_size=batch_size, wait=wait_ms / 1000)
        made = App(service, clips, Path(uploads), lambda: _tracker(cfg, trained))
        serve_until_signal(made.application(hosts_of(host, hosts)), listener, service.announce_stop)
        service.close()
    return {"run": str(out_dir)}


def _tracker(cfg: DictConfig, trained: Trained) -> PropagationTracker:
    """Return a new tracker on the trained model's backbone."""
    settings = instantiate(cfg.tracker)
    return PropagationTracker(trained.model.backbone, settings, device=trained.device, autocast=trained.autocast)
