"""NiceGUI's web socket takes the messages of a page, and writes nothing that a visitor sends to the log."""

import asyncio

import pytest
from nicegui import app as nicegui_app
from nicegui import core
from socketio.packet import ACK, CONNECT, DISCONNECT

from dinoseg.serving.sockets import EventPacket, restrict_sockets


@pytest.fixture
def handlers(monkeypatch):
    """The handlers of a restricted socket by event, and the sockets that they have closed."""
    monkeypatch.setitem(core.sio.handlers, "/", dict(core.sio.handlers["/"]))
    for owner, name in ((core.sio, "packet_class"), (core.sio.eio, "transports")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(nicegui_app.config, "socket_io_js_transports", None)
    closed = []

    async def disconnect(sid):
        closed.append(sid)

    monkeypatch.setattr(core.sio, "disconnect", disconnect)
    restrict_sockets()
    return core.sio.handlers["/"], closed


@pytest.mark.parametrize("event", ["handshake", "event", "javascript_response", "ack"])
@pytest.mark.parametrize("content", [(), ({},), (3,), ([],), ("text",), ({"client_id": []},), ({}, {})], ids=repr)
def test_malformed_event_closes_its_socket(handlers, event, content, caplog):
    known, closed = handlers
    asyncio.run(known[event]("socket", *content))
    assert closed == ["socket"] and caplog.text == ""


def test_log_messages_of_visitors_are_ignored(handlers, caplog):
    known, closed = handlers
    known["log"]("socket", {"client_id": "x", "level": "error", "message": "a\n[root][ERROR] b"})
    assert closed == [] and caplog.text == ""


def test_only_web_sockets_are_a_transport(handlers):
    assert core.sio.eio.transports == nicegui_app.config.socket_io_js_transports == ["websocket"]


@pytest.mark.parametrize("text", ['51-["event",{"_placeholder":true,"num":0}]', '5999999-["a"]', "2[[]]", "2[{}]", "2"])
def test_packets_without_a_name_or_with_attachments_are_refused(text):
    with pytest.raises((ValueError, TypeError)):
        EventPacket(encoded_packet=text)


def test_packet_of_a_page_is_parsed():
    packet = EventPacket(encoded_packet='27["event",{"id":3}]')
    assert packet.data == ["event", {"id": 3}] and packet.id == 7


@pytest.mark.parametrize(("text", "kind"), [("0", CONNECT), ('0{"id":1}', CONNECT), ("1", DISCONNECT), ("35[1]", ACK)])
def test_packets_that_are_no_events_are_parsed(text, kind):
    assert EventPacket(encoded_packet=text).packet_type == kind
