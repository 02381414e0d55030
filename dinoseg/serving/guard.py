"""Host and origin checks: protection against cross-site requests and DNS rebinding."""

import logging
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


@dataclass(frozen=True)
class Hosts:
    """Host names that a server accepts, against DNS rebinding.

    A browser sends the name in its address bar, even if an attacker made that name resolve to this server.

    Args:
        names: in lower case; `*` accepts any.
        addresses: whether any IP address is accepted: an address cannot be made to resolve elsewhere.
    """

    names: frozenset[str]
    addresses: bool = False

    @classmethod
    def of(cls, host: str, further: Sequence[str] = ()) -> "Hosts":
        """Return the accepted hosts of a server that listens on `host`; log a warning if other machines can reach it.

        On loopback these are the names of loopback and `further`, elsewhere also this machine's name and all addresses.

        Raises:
            UserError: if an entry of `further` is no host name, such as an address with a scheme or a port.
        """
        for name in further:
            if not (re.fullmatch(r"[A-Za-z0-9_.-]+|\*", name) or _is_address(name)):
                raise UserError(
                    f"mode.hosts: {name!r} is not a host name. Give the part between http:// and the port, such as "
                    "segment.example.org, or * for any."
                )
        names = frozenset(name.lower() for name in (*_LOOPBACK, host, *further))
        if is_loopback(host):
            return cls(names)
        hosts = cls(names | {socket.gethostname().lower()}, addresses=True)
        logger.warning(
            "mode.host=%s is reachable from other machines, without authentication or TLS: anyone who can reach it can "
            "use it, %s. Leave mode.host out to serve this machine only; docs/serving.md describes a reverse proxy.",
            host,
            f"under the host names {hosts}",
        )
        return hosts

    def __contains__(self, header: str) -> bool:
        """Return whether a Host header holds an accepted host."""
        name = _name(header)
        return "*" in self.names or name in self.names or (self.addresses and _is_address(name))

    def __str__(self) -> str:
        """Return the accepted hosts in words."""
        if "*" in self.names:
            return "any name"
        return ", ".join(sorted(self.names)) + (" or any IP address" if self.addresses else "")


class Guard:
    """ASGI middleware that refuses cross-site requests and adds security headers to every response.

    Args:
        app: the guarded application.
        hosts: accepted host names.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 403 if the host is not accepted, or the request comes from another site's page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        message = self._wrong(scope["method"], Headers(scope=scope))
        answer = JSONResponse({"error": {"rule": "origin", "message": message}}, 403) if message else self._app
        await answer(scope, receive, with_headers)

    def _wrong(self, method: str, headers: Headers) -> str:
        host = headers.get("host", "")
        if host not in self._hosts:
            return f"{host!r} is not a host name of this server. Use its IP address, or add the name to mode.hosts."
        origin = headers.get("origin")
        other = origin is not None and origin.lower().partition("://")[2] != host.lower()
        sent = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        # a link from another site may open the page: it is not framed, and a GET changes nothing
        followed = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if other or (sent and not (followed and headers.get("sec-fetch-dest") == "document")):
            return "Requests from pages of other sites are refused."
        return ""


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on this name or address."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    """Return the name in a Host header, without the port and the brackets of IPv6."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
