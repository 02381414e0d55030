"""HTTP server: uvicorn on a socket that is bound before the model is loaded."""

import logging
import re
import socket
from asyncio import CancelledError
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated

import uvicorn
from starlette.types import ASGIApp

from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Interrupted
from dinoseg.utils.ranges import Range

logger = logging.getLogger(__name__)
Port = Annotated[int, Range("a port from 0 to 65535", 0, 65535)]
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CONNECTIONS = 256  # at once, which bounds memory and files; requests on further ones get a 503
_HEADER_BYTES = 2**16  # of a request; browsers send all cookies of a host, whatever their port
_MESSAGE_BYTES = 2**19  # of a web socket; a brush stroke of 20,000 points has up to 320 kB
_LAST_SECONDS = 20  # of requests in progress after a stop signal, such as uploads that stall
WORK_SECONDS = 15  # of the model's work after a stop signal: the others are answered within `_LAST_SECONDS`


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port; port 0 selects a free one.

    Raises:
        UserError: if the port is taken or not allowed, or the host is not one of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"Cannot listen on mode.host={host}, mode.port={port}: {error}. Stop the program that listens there, or "
            "choose another port (0: any that is free; ports below 1024 need administrator rights)."
        ) from error


def list_hosts(host: str, further: Sequence[str]) -> list[str]:
    """Return the host names of requests that are answered; log a warning if other machines can reach the server.

    A browser sends the name in its address bar, even if an attacker made that name resolve to this server.

    Raises:
        UserError: if an entry of `further` is no host name, such as an address with a scheme or a port.
    """
    for name in further:
        if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9_.-]+", name):
            raise UserError(f"mode.hosts: {name!r} is not a host name. Give it without http:// and port, or * for any.")
    if host not in _LOOPBACK:
        logger.warning(
            "mode.host=%s is reachable from other machines, without authentication or TLS: anyone who can reach it can "
            "use it. docs/serving.md describes a reverse proxy.",
            host,
        )
        further = further or ["*"]
    return [f"[{name}]" if ":" in name else name for name in (*_LOOPBACK, host, *further)]


def serve_until_signal(app: ASGIApp, listener: socket.socket, stop: Callable[[float], None]) -> None:
    """Serve requests until SIGINT or SIGTERM; return when those in progress are answered.

    Args:
        app: the application.
        listener: its socket.
        stop: called at the signal with the seconds in which all work must end.
    """
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http="h11",  # httptools collects headers and chunk extensions without a limit
        h11_max_incomplete_event_size=_HEADER_BYTES,
        ws_max_size=_MESSAGE_BYTES,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    logging.getLogger("uvicorn.error").addFilter(_shorten_error)
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    try:
        _Server(config, stop).run([listener])
    except Interrupted:
        print("stopped")  # uvicorn raises the signal again when it has finished


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, stop: Callable[[float], None]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop(WORK_SECONDS)
        super().handle_exit(sig, frame)


def _shorten_error(record: logging.LogRecord) -> bool:
    """Log one line for invalid text on a web socket; only errors of the application have a traceback.

    Requests that are cancelled at a stop signal, such as an upload that stalls, have no line: one states their number.
    """
    if not record.getMessage().startswith("Exception in ASGI application"):
        record.exc_info = None
    return record.exc_info is None or not isinstance(record.exc_info[1], CancelledError)
