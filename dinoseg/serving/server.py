"""HTTP server that stops on a signal: it finishes the requests in progress and accepts no new ones."""

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Deferral, Interrupted, deferred

_NOTICE = "Stopping after the current requests; new ones are refused. Press again to stop at once."
_CONNECTIONS = 1000  # concurrent connections; requests on further ones get a 503
_IDLE = 15  # seconds that a connection may idle between two requests
_LINGER = 2  # seconds for a client to notice a response to its incomplete request
_MIN_READ = 2**18  # bytes of a response that a client must read in `_IDLE` seconds
_LAST_BYTES = 0.5  # seconds in which clients connected at the signal can still send their request


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a port and does not listen yet; port 0 selects a free one.

    Raises:
        UserError: if the port is taken or not allowed, or the host is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"mode.host={host} mode.port={port}: cannot resolve the address ({error}). Give a name or address of this "
            "machine."
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _not_ours(host, port, error) from error
    return listener


def serve_until_signal(app: ASGIApp, listener: socket.socket, on_stop: Callable[[], None], *, patience: float) -> None:
    """Serve requests until SIGINT or SIGTERM; return when those in progress are answered.

    Args:
        app: the application.
        listener: as `bound` returns it; closed at the end.
        on_stop: called on the signal, before the last requests are finished.
        patience: seconds for the last requests; clients that do not read their response are disconnected then.

    Raises:
        UserError: if another program has begun to listen on the port.
        Interrupted: at once, on a second signal.
    """
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(_CONNECTIONS)
    except OSError as error:
        raise _not_ours(host, port, error) from error
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=ceil(patience),
    )
    try:
        with deferred(_NOTICE) as stop:
            print(f"listening on {address}", flush=True)
            _Server(config, stop, on_stop).run([listener])
    except Interrupted as end:
        if end.again:
            raise


@dataclass
class _Wait:
    """The wait for a connection's client: to read bytes of its last response, or else to send a new request."""

    cycle: Any  # uvicorn's, of the last request
    unread: int
    since: float

    def has_no_progress(self, unread: int) -> bool:
        """Return whether the client has read neither all unread bytes, nor enough of them."""
        return unread == self.unread or 0 < unread < self.unread < unread + _MIN_READ


class _Server(uvicorn.Server):
    """uvicorn's server, stopped by a `Deferral` instead of its own signal handlers."""

    def __init__(self, config: uvicorn.Config, stop: Deferral, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop, self._on_stop = stop, on_stop
        self._waits: dict[Any, _Wait] = {}  # by connection

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `deferred`."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Check for a stop signal, several times a second."""
        self.should_exit = self.should_exit or bool(self._stop.signal)
        self._close_slow()
        return await super().on_tick(counter)

    def _close_slow(self) -> None:
        """Close connections whose client is too slow to send a request, to stop sending one, or to read its response.

        uvicorn itself only closes connections that are idle between two requests.
        """
        now, connections = time.monotonic(), cast(Any, self.server_state.connections)
        before, self._waits = self._waits, {}
        for connection in connections.copy():
            cycle, unread = connection.cycle, connection.transport.get_write_buffer_size()
            answered = cycle is None or cycle.response_complete
            if not (answered or unread):
                continue  # the server is computing
            wait = before.get(connection)
            if wait is None or wait.cycle is not cycle or not wait.has_no_progress(unread):
                wait = _Wait(cycle, unread, now)
            self._waits[connection] = wait
            sending = answered and cycle is not None and cycle.more_body
            if now - wait.since > (_LINGER if sending and not unread else _IDLE):
                (connection.transport.abort if unread else connection.transport.close)()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and finish the requests of all clients that have connected."""
        self._on_stop()
        # connections that wait to be accepted would be cut off when the socket is closed
        pending = [connection for listener in sockets or [] for connection in _accepted(listener)]
        for server in self.servers:
            server.close()
        for connection in pending:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        # uvicorn closes connections whose request it has not read yet, and loses these requests
        await asyncio.sleep(_LAST_BYTES)
        await super().shutdown(sockets)
        for connection in cast(Any, self.server_state.connections).copy():
            connection.transport.abort()  # of a client that does not read
        await asyncio.sleep(0)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections that wait to be accepted by a non-blocking socket."""
    with suppress(OSError):
        while True:
            yield listener.accept()[0]


def _not_ours(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"Cannot listen on {host}, port {port}: {error.strerror}. {_remedy(error)}")


def _remedy(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "Another program listens there: stop it, or choose another mode.port (0: any that is free)."
    if error.errno == errno.EACCES:
        return "Ports below 1024 need administrator rights: choose another mode.port."
    return "Check mode.host and mode.port."
