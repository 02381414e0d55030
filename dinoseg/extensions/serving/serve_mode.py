"""mode=serve: HTTP endpoint of a trained model."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.checkpoints.source import ModelSource
from dinoseg.extensions.serving.endpoint import build_endpoint
from dinoseg.extensions.serving.server import Port, bind_socket, list_hosts, serve_until_signal
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.extensions.serving.source import load_served
from dinoseg.utils.atomic import scratch_folder
from dinoseg.utils.ranges import Count, Positive, Share


def serve(
    cfg: DictConfig,
    *,
    out_dir: Path,
    model: str | None,
    host: str,
    port: Port,
    hosts: Sequence[str],
    max_mib: Positive,
    max_pixels: Count,
    timeout: Positive,
    min_score: Share,
) -> dict[str, Any]:
    """Answer requests (see `build_endpoint`) until SIGINT or SIGTERM; then finish the pending requests.

    Raises:
        UserError: there is no model, the port is taken, or `hosts` are no valid names.
    """
    accepted = list_hosts(host, hosts)
    run = Path(out_dir)
    # next to the run folder, so that the next server removes the files of a killed one
    with bind_socket(host, port) as listener, scratch_folder(run.parent, "uploads") as uploads:
        served = load_served(ModelSource(cfg), run, model)
        with closing(SharedModel(served, max_pixels, timeout=timeout, min_score=min_score)) as shared:
            application = build_endpoint(shared, uploads, hosts=accepted, max_mib=max_mib)
            serve_until_signal(application, listener, shared.stop)
    return {"run": str(out_dir)}
