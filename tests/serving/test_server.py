"""The server binds its port first, warns of the network, and finishes its requests when it is stopped."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection

import pytest
import uvicorn
from command_line import call
from serving_stand_ins import encode_image, picture
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from dinoseg.serving import guard
from dinoseg.serving import server as server_module
from dinoseg.serving.server import bind_socket, list_hosts, serve_until_signal
from dinoseg.utils.errors import UserError


def test_a_taken_port_or_foreign_host_is_one_message():
    with bind_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"mode.port={port}: .*Address already in use.* choose another port"):
            bind_socket("127.0.0.1", port)
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(UserError, match=f"Cannot listen on mode.host={host}"):
            bind_socket(host, 8000)


def test_only_known_host_names_are_accepted(caplog):
    loopback = ["localhost", "127.0.0.1", "[::1]"]
    assert list_hosts("127.0.0.1", ["a.example"]) == [*loopback, "127.0.0.1", "a.example"] and not caplog.text
    assert list_hosts("0.0.0.0", []) == [*loopback, "0.0.0.0", "*"]
    assert "mode.host=0.0.0.0 is reachable from other machines, without authentication" in caplog.text
    assert "*" not in list_hosts("0.0.0.0", ["a.example"])
    for name in ("http://a.example", "a:80", "a*b", ""):
        with pytest.raises(UserError, match="is not a host name"):
            list_hosts("127.0.0.1", [name])


def test_connections_are_bounded(monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: configs.append(self.config))
    with bind_socket("127.0.0.1", 0) as listener:
        serve_until_signal(lambda: None, listener)
    assert configs[0].limit_concurrency == server_module._CONNECTIONS == 256  # as docs/security.md says
    assert guard.MAX_SOCKETS == 64 and configs[0].ws_max_size == 2**19
    assert configs[0].timeout_graceful_shutdown == 30 and not configs[0].server_header
    assert re.search(r"listening on http://127.0.0.1:\d+\n", capsys.readouterr().out)


@pytest.fixture
def running_app(monkeypatch):
    """The port of a small application that is served in a thread."""
    servers = []
    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: (servers.append(self), run(self, sockets)))
    with bind_socket("127.0.0.1", 0) as listener:
        application = Starlette(routes=[Route("/", lambda request: Response("answer"))])
        thread = threading.Thread(target=serve_until_signal, args=(application, listener))
        thread.start()
        yield listener.getsockname()[1]
        servers[0].should_exit = True
        thread.join()


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 10,
        b"GET /",
        b"GET / HTTP/1.1\r\nhost: localhost\r\na: ",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1;",
    ],
    ids=["headers", "address", "value", "chunk"],
)
def test_long_headers_end_the_connection(running_app, start):
    with socket.create_connection(("127.0.0.1", running_app), timeout=20) as client:
        client.sendall(start)
        sent = 0
        with suppress(ConnectionError):
            while sent < 2**25:
                client.sendall(b"a" * 2**16 if start[-1:] != b"\n" else b"a: b\r\n" * 2**13)
                sent += 2**16
    assert sent < 2**24  # the kernel's buffers take a few MB
    connection = HTTPConnection("127.0.0.1", running_app, timeout=20)
    connection.request("GET", "/", headers={"cookie": "a" * 50_000})
    assert connection.getresponse().read() == b"answer"
    connection.close()


def test_a_stalled_upload_has_no_traceback_at_the_stop(caplog, monkeypatch):
    async def upload(request):
        servers[0].should_exit = True
        return Response(await request.body())

    servers = []
    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: (servers.append(self), run(self, sockets)))
    monkeypatch.setattr(server_module, "_LAST_SECONDS", 0.1)
    with bind_socket("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf")
        serve_until_signal(Starlette(routes=[Route("/", upload, methods=["POST"])]), listener)
    assert [record.getMessage() for record in caplog.records] == [
        "Cancel 1 running task(s), timeout graceful shutdown exceeded"
    ]


@pytest.fixture
def server(trained_once, tmp_path):
    """A server in a process of its own, and its port."""
    words = [f"resume={trained_once}/segmenter", "engine=cpu", "mode.port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dinoseg", "mode=serve", *words, f"hydra.run.dir={tmp_path}/run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield process, next(int(found[1]) for line in process.stdout if (found := re.search(r"http://\S+:(\d+)", line)))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def post(port, body):
    """Return status and content; None where the server no longer accepts connections or requests."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", "/segment", body)
        response = connection.getresponse()
        return response.status, response.read()
    except ConnectionError:
        return None
    finally:
        connection.close()


@pytest.mark.heavy
def test_requests_in_progress_are_answered_when_it_is_stopped(server, tmp_path):
    process, port = server
    bodies = [encode_image(picture(40 + number % 4, 60, seed=number)) for number in range(20)]
    wanted = [post(port, body) for body in bodies]
    assert {status for status, _ in wanted} == {200}
    for _ in range(10):  # clients that send half a request, or leave before the response
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"POST /segment HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf")
    results = []

    def send_until_stopped(first):
        for number in itertools.count(first):
            result = post(port, bodies[number % 20])
            results.append((number % 20, result))
            if result is None:
                return

    threads = [threading.Thread(target=send_until_stopped, args=(first,), daemon=True) for first in range(20)]
    for thread in threads:
        thread.start()
    while len(results) < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0 and "stopped" in process.stdout.read()
    for thread in threads:
        thread.join(300)
    answered = [(number, result) for number, result in results if result is not None]
    assert len(answered) > 50 and all(result == wanted[number] for number, result in answered)
    assert not list(tmp_path.glob(".uploads*"))


def test_server_without_a_model_reports_the_missing_keys(tmp_path):
    done = call(tmp_path, "mode=serve", "engine=cpu", "mode.port=0")
    assert done.status == 1 and "resume is not set" in done.err and not list(tmp_path.glob("outputs/*/*"))
    both = call(tmp_path, "mode=serve", "engine=cpu", "mode.port=0", "mode.model=a.onnx", "mode.max_mib=0")
    assert both.status == 1 and "mode.max_mib=0 is out of range" in both.err
    wrong = call(tmp_path, "mode=app", "engine=cpu", "mode.port=0", "tracker.short_side=0", "mode.hosts=[]")
    assert wrong.status == 1 and "short_side=0 is out of range" in wrong.err
