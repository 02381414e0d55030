"""Checks of every request and every web socket, before the endpoint or the app sees it."""

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

logger = logging.getLogger(__name__)
MAX_SOCKETS = 64  # open pages; a quarter of the connections, so that requests are answered beside them
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # NiceGUI compiles its templates in the browser
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
}


class SiteGuard:
    """ASGI middleware that refuses pages of other sites, bounds web sockets, and adds security headers.

    Browsers let a page of any site open a web socket, and only name that site in the header `origin`.

    Args:
        app: the guarded application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._sockets = 0  # that are open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or serve a web socket."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._serve_socket(scope, receive, send)
        elif _is_foreign(scope):
            await PlainTextResponse("Requests from pages of other sites are refused.", 403)(scope, receive, send)
        else:
            await self._app(scope, receive, _add_headers(send))

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_foreign(scope) or self._sockets >= MAX_SOCKETS:
            await WebSocketClose()(scope, receive, send)  # before it is accepted: status 403
            return
        self._sockets += 1
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # of a message that no page sends; the server closes the socket
            logger.debug("A web socket sent an invalid message: %r", error)
        finally:
            self._sockets -= 1


def _is_foreign(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    origin = headers.get("origin", "")
    return origin != "" and origin.lower().partition("://")[2] != headers.get("host", "").lower()


def _add_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_HEADERS)
        await send(message)

    return send_with_headers
