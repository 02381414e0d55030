"""Web sockets satisfy what requests have to: host, origin, and a limited number."""

import pytest
from fastapi.testclient import TestClient
from serving_stand_ins import shared_model
from starlette.websockets import WebSocket, WebSocketDisconnect

from dinoseg.serving import guard
from dinoseg.serving.endpoint import build_endpoint
from dinoseg.serving.server import list_hosts


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
