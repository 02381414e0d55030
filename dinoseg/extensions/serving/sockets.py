"""Settings of NiceGUI's web socket: it takes what a page of the app sends, and nothing else."""

import logging
from collections.abc import Callable
from functools import partial
from inspect import isawaitable
from typing import Any

from nicegui import app as nicegui_app
from nicegui import core
from socketio.packet import EVENT, Packet

logger = logging.getLogger(__name__)


class EventPacket(Packet):
    """A packet of socket.io without attachments, which it would collect without a limit."""

    def decode(self, encoded_packet: str | bytes) -> int:
        """Parse a message.

        Raises:
            ValueError: if it announces attachments, or is an event without a name.
        """
        attachments = super().decode(encoded_packet)
        if attachments or (self.packet_type == EVENT and not isinstance(self.data[0], str)):
            raise ValueError("Pages send only named events without attachments.")
        return 0


def restrict_sockets() -> None:
    """Let pages connect by web sockets only, and close a socket at the first malformed message.

    Long polling is off: its sessions are no connections, so that nothing would limit their number.
    """
    core.sio.eio.transports = ["websocket"]
    core.sio.packet_class = EventPacket
    nicegui_app.config.socket_io_js_transports = ["websocket"]
    for name in ("engineio.server", "socketio.server"):  # they log a traceback for each malformed packet
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for event in ("handshake", "event", "javascript_response", "ack"):
        core.sio.on(event, partial(_handle, core.sio.handlers["/"][event]))
    core.sio.on("log", _ignore)  # the visitor's text would be written to the log


async def _handle(handler: Callable[..., Any], sid: str, *args: Any) -> Any:
    try:
        result = handler(sid, *args)
        return await result if isawaitable(result) else result
    except Exception as error:
        logger.debug("A web socket sent an invalid message: %r", error)
        await core.sio.disconnect(sid)


def _ignore(sid: str, *args: Any) -> None:
    """Ignore a message."""
