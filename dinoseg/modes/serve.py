"""mode=serve: a trained model as an HTTP endpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.ranges import Count, NotNegative
from dinoseg.serving.endpoint import endpoint
from dinoseg.serving.guard import hosts_of
from dinoseg.serving.limits import Limits, Port
from dinoseg.serving.server import bound, serve_until_signal
from dinoseg.serving.service import Service
from dinoseg.serving.source import load_served, usual_batch


def serve(
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
) -> dict[str, Any]:
    """Answer POST /segment, /health and /metrics until SIGINT or SIGTERM; finish what is in hand then.

    Raises:
        UserError: there is no model, or the port is taken.
    """
    limits.check_wait(wait_ms)
    with bound(host, port) as listener:
        served = load_served(cfg, Path(out_dir), model)
        service = Service(served, limits, batch_size=batch_size or usual_batch(served), wait=wait_ms / 1000)
        serve_until_signal(endpoint(service, hosts_of(host, hosts)), listener, service.announce_stop)
    service.close()
    print(f"stopped: {service.metrics.summary()}")
    return {"run": str(out_dir)}
