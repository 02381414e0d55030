"""The server binds its port first, warns of the network, and finishes its requests; files are served as they say."""

import itertools
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import uvicorn
from command_line import call
from portable_parts import export_file, write_untrained
from serving_stand_ins import encode_image, picture, start_server
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.serving import guard
from dinoseg.extensions.serving import server as server_module
from dinoseg.extensions.serving.server import bind_socket, list_hosts, serve_until_signal
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import write_tensors


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
    configs, stops = [], []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: (configs.append(self.config), self.handle_exit(15, None))
    )
    with bind_socket("127.0.0.1", 0) as listener:
        serve_until_signal(lambda: None, listener, stops.append)
    assert configs[0].limit_concurrency == server_module._CONNECTIONS == 256  # as docs/security.md says
    assert guard.MAX_SOCKETS == 64 and configs[0].ws_max_size == 2**19
    assert stops == [15]
    assert configs[0].timeout_graceful_shutdown == 20 and not configs[0].server_header
    assert re.search(r"listening on http://127.0.0.1:\d+\n", capsys.readouterr().out)


@pytest.fixture
def servers(monkeypatch):
    """The servers that a test starts, as soon as they run."""
    started = []
    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: (started.append(self), run(self, sockets)))
    return started


@pytest.fixture
def running_app(servers):
    """The port of a small application that is served in a thread."""
    with bind_socket("127.0.0.1", 0) as listener:
        application = Starlette(routes=[Route("/", lambda request: Response("answer"))])
        thread = threading.Thread(target=serve_until_signal, args=(application, listener, print))
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


def test_a_stalled_upload_has_no_traceback_at_the_stop(caplog, monkeypatch, servers):
    async def upload(request):
        servers[0].should_exit = True
        return Response(await request.body())

    monkeypatch.setattr(server_module, "_LAST_SECONDS", 0.1)
    with bind_socket("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf")
        serve_until_signal(Starlette(routes=[Route("/", upload, methods=["POST"])]), listener, print)
    assert caplog.messages == ["Cancel 1 running task(s), timeout graceful shutdown exceeded"]


@pytest.fixture
def server(trained_once, tmp_path):
    """A server in a process of its own, and its port."""
    with start_server("serve", trained_once, tmp_path, "hydra.run.dir=run") as (process, address):
        yield process, urlsplit(address).port


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mode=serve",), "resume is not set"),
        (("mode=serve", "mode.model=a.onnx", "mode.max_mib=0"), "mode.max_mib=0 is out of range"),
        (("mode=serve", "resume=dinoseg:surgery", "mode.min_score=0.4"), "mode.min_score is for a model of objects"),
        (("mode=serve", "mode.model=a.onnx", "mode.timeout=0"), "mode.timeout=0 is out of range"),
        (("mode=app", "tracker.short_side=0", "mode.hosts=[]"), "short_side=0 is out of range"),
        (("mode=serve", "mode.model=a.onnx", "engine.precision=bf16"), "engine.precision=bf16: a.onnx is an ONNX file"),
        (("mode=serve", "mode.model=a.onnx", "backbone.weights=x"), "backbone.weights=x: a.onnx is an ONNX file"),
    ],
)
def test_server_reports_missing_and_invalid_keys(tmp_path, words, message):
    (tmp_path / "a.onnx").touch()  # options are refused before the file is read
    done = call(tmp_path, *words, "engine=cpu", "mode.port=0")
    assert done.status == 1 and message in done.err and not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.heavy
def test_a_delta_is_given_its_backbone_from_the_command_line(compose, tmp_path, monkeypatch):
    def start_mode(mode, *words):
        monkeypatch.setattr(f"dinoseg.extensions.serving.{mode}_mode.serve_until_signal", lambda *_, **__: None)
        return call(tmp_path, f"mode={mode}", "engine=cpu", "mode.port=0", *words)

    weights, moved = tmp_path / "backbone.safetensors", tmp_path / "moved.safetensors"
    backbone = Builder(compose("backbone=tiny_surgical", "data.classes=[a]")).backbone()
    write_tensors(weights, backbone.export_state(), {})
    words = ("backbone=tiny_surgical", f"backbone.weights={weights}", "adapter=frozen", "head=linear")
    delta = export_file(write_untrained(compose, tmp_path, *words), tmp_path / "out", delta=True, gated=True)
    weights.rename(moved)
    for mode in ("serve", "app"):
        done = start_mode(mode, f"mode.model={delta}")
        assert done.status == 1 and "resume=" not in done.err
        assert f"mode.model={delta}: " in done.err and "Set its current path: backbone.weights=PATH." in done.err
        done = start_mode(mode, f"mode.model={delta}", f"backbone.weights={moved}")
        assert done.status == 0, done.err
    done = start_mode("serve", f"resume={delta}", f"backbone.weights={moved}")
    assert done.status == 0, done.err
    done = start_mode("serve", f"mode.model={delta}", f"backbone.weights={moved}", "inference=windows")
    assert (
        done.status == 0 and ("No effect here: inference=windows. mode.model uses its stored settings") in done.err
    ), done.err
