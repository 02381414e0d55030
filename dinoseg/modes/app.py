"""mode=app: a page in the browser that segments pictures and clips, and follows what is painted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.ranges import Count, NotNegative
from dinoseg.serving.app import App
from dinoseg.serving.guard import hosts_of
from dinoseg.serving.limits import ClipLimits, Limits, Port
from dinoseg.serving.server import bound, serve_until_signal
from dinoseg.serving.service import Service
from dinoseg.serving.source import load_served, tracker_maker, usual_batch
from dinoseg.storage.atomic import scratch_folder


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
    """Serve the app, and the endpoint of mode=serve beside it, until SIGINT or SIGTERM.

    Raises:
        UserError: there is no model, or the port is taken.
    """
    limits.check_wait(wait_ms)
    with bound(host, port) as listener, scratch_folder(out_dir, "uploads") as uploads:
        served = load_served(cfg, Path(out_dir), model)
        service = Service(served, limits, batch_size=batch_size or usual_batch(served), wait=wait_ms / 1000)
        made = App(service, clips, uploads, tracker_maker(cfg, served))
        serve_until_signal(made.application(hosts_of(host, hosts)), listener, service.announce_stop)
        service.close()
    print("stopped: all uploads are removed")
    return {"run": str(out_dir)}
