"""Who may ask: no page of another site through somebody's browser, and no name that was made to point here."""

from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
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


class Guard:
    """Refuse what a browser was led to send from elsewhere, and give every answer headers that bind it to this site.

    Args:
        app: what is guarded.
        hosts: names by which it may be asked; none: by any, as where nobody can know them beforehand.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 where the host is none of ours, or the request comes from another site's page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        message = self._wrong(Headers(scope=scope))
        answer = JSONResponse({"error": {"rule": "origin", "message": message}}, 403) if message else self._app
        await answer(scope, receive, with_headers)

    def _wrong(self, headers: Headers) -> str:
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return f"This server is not called {host!r}. Ask it as {known}, or name it in mode.hosts."
        origin = headers.get("origin")
        other = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if other or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return "A page of another site may not ask this server."
        return ""


def hosts_of(host: str, further: Sequence[str]) -> list[str]:
    """Return the names by which a server may be asked that listens on `host`: on loopback, those of loopback alone."""
    if not is_loopback(host):
        return [host, *LOOPBACK, *further] if further else []
    return [*LOOPBACK, host, *further]


def is_loopback(host: str) -> bool:
    """Return whether nobody but this machine reaches a server that listens on a name or address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """Return a Host header's name without the port and without the brackets of IPv6."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
