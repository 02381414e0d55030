"""mode=serve: HTTP endpoint of a trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.experiment.source import ModelSource
from dinoseg.serving.endpoint import endpoint
from dinoseg.serving.guard import Hosts
from dinoseg.serving.limits import Limits, Port
from dinoseg.serving.server import serve_until_signal
from dinoseg.serving.start import started
from dinoseg.utils.ranges import Count, NotNegative


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
    """Answer POST /segment, /health and /metrics until SIGINT or SIGTERM; then finish the pending requests.

    Raises:
        UserError: there is no model, the port is taken, or `hosts` are no valid names.
    """
    known = Hosts.of(host, hosts)
    with started(
        ModelSource(cfg),
        Path(out_dir),
        model=model,
        host=host,
        port=port,
        batch_size=batch_size,
        wait_ms=wait_ms,
        limits=limits,
    ) as (listener, service):
        serve_until_signal(endpoint(service, known), listener, service.announce_stop, patience=limits.patience)
    print(f"stopped: {service.metrics.summary()}")
    return {"run": str(out_dir)}
