"""Web sockets satisfy what requests have to, take the messages of a page, and log nothing that a visitor sends."""

import asyncio

import pytest
from fastapi.testclient import TestClient
from nicegui import app as nicegui_app
from nicegui import core
from serving_stand_ins import shared_model
from socketio.packet import ACK, CONNECT, DISCONNECT
from starlette.websockets import WebSocket, WebSocketDisconnect

from dinoseg.extensions.serving import guard
from dinoseg.extensions.serving.endpoint import build_endpoint
from dinoseg.extensions.serving.server import list_hosts
from dinoseg.extensions.serving.sockets import EventPacket, restrict_sockets


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


def test_packets_of_a_page_are_parsed():
    packet = EventPacket(encoded_packet='27["event",{"id":3}]')
    assert packet.data == ["event", {"id": 3}] and packet.id == 7
    for text, kind in (("0", CONNECT), ('0{"id":1}', CONNECT), ("1", DISCONNECT), ("35[1]", ACK)):
        assert EventPacket(encoded_packet=text).packet_type == kind


async def echo(socket: WebSocket):
    await socket.accept()
    async for text in socket.iter_text():
        if text == "malformed":
            raise ValueError("text\nof a visitor")
        await socket.send_text(text)


@pytest.fixture
def connect(tmp_path):
    """Return a function that opens a web socket on the endpoint's application."""
    with shared_model() as shared:
        application = build_endpoint(shared, tmp_path, hosts=list_hosts("127.0.0.1", []), max_mib=1.0)
        application.add_api_websocket_route("/echo", echo)
        with TestClient(application) as ask:
            yield lambda **headers: ask.websocket_connect("ws://localhost/echo", headers=headers)


def assert_refused(connection):
    with pytest.raises(WebSocketDisconnect), connection:
        pytest.fail("The web socket is accepted.")


@pytest.mark.parametrize("headers", [{}, {"origin": "http://localhost"}, {"origin": "https://LOCALHOST"}])
def test_web_socket_of_the_own_site_is_accepted(connect, headers):
    with connect(**headers) as socket:
        socket.send_text("a")
        assert socket.receive_text() == "a"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost.evil.example", "http://localhost:81"]
)
def test_web_sockets_of_other_sites_are_refused(connect, origin):
    assert_refused(connect(origin=origin))


def test_web_sockets_under_other_host_names_are_refused(connect):
    assert_refused(connect(host="evil.example", origin="http://evil.example"))


def test_number_of_web_sockets_is_limited(connect, monkeypatch):
    monkeypatch.setattr(guard, "MAX_SOCKETS", 2)
    with connect(), connect():
        assert_refused(connect())
    with connect() as socket:
        socket.send_text("a")


def test_malformed_message_ends_a_socket_without_a_traceback(connect, caplog):
    with connect() as socket:
        socket.send_text("malformed")
    assert caplog.text == ""
    with connect(), connect():
        pass
