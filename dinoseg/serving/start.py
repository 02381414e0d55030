"""Startup of mode=serve and mode=app: bind the port, load the model and start the service."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinoseg.experiment.source import ModelSource
from dinoseg.serving.limits import Limits, Port
from dinoseg.serving.server import bound
from dinoseg.serving.service import Service
from dinoseg.serving.source import load_served, usual_batch
from dinoseg.utils.ranges import Count, NotNegative


@contextmanager
def started(
    source: ModelSource,
    out_dir: Path,
    *,
    model: str | None,
    host: str,
    port: Port,
    batch_size: Count | None,
    wait_ms: NotNegative,
    limits: Limits,
) -> Iterator[tuple[socket.socket, Service]]:
    """Yield a bound socket and the service of the model; at the end, finish all waiting images.

    Raises:
        UserError: if the wait is too long, the port is taken, or there is no model; checked in this order, since
            loading is slow.
    """
    limits.check_wait(wait_ms)
    with bound(host, port) as listener:
        served = load_served(source, out_dir, model)
        service = Service(served, limits, batch_size=batch_size or usual_batch(served), wait=wait_ms / 1000)
        try:
            yield listener, service
        finally:
            service.close()
