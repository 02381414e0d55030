import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from asyncio.selector_events import _SelectorSocketTransport
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from unittest.mock import MagicMock

import pytest
import uvicorn
from command_line import call
from serving_stand_ins import FACTS, Bright, encoded, picture

from dinoseg.export.runtime.model import Model
from dinoseg.serving import server as server_module
from dinoseg.serving import start
from dinoseg.serving.guard import is_loopback
from dinoseg.serving.limits import Limits
from dinoseg.serving.server import bound
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Deferral


def test_a_port_that_is_taken_is_one_message():
    with bound("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use. .* choose another mode.port"):
            bound("127.0.0.1", port)


def test_a_place_that_is_none_of_ours_is_one_message():
    with pytest.raises(UserError, match="Cannot listen on 192.0.2.1"):
        bound("192.0.2.1", 8000)
    with pytest.raises(UserError, match="cannot resolve the address"):
        bound("no such host", 8000)


def test_loopback_is_known_by_its_address():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.0.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.7", "example.org", "")))


@contextmanager
def serving(app, **options):
    """Serve an application in a thread; give its port, and what ends it as a signal would."""
    stop = Deferral("")
    config = uvicorn.Config(app, log_config=None, lifespan="off", **options)
    with bound("127.0.0.1", 0) as listener:
        listener.listen()
        thread = threading.Thread(target=server_module._Server(config, stop, lambda: None).run, args=([listener],))
        thread.start()

        def end():
            stop.signal = signal.SIGTERM
            thread.join(120)
            return not thread.is_alive()

        try:
            yield listener.getsockname()[1], end
        finally:
            ended = end()
        assert ended


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def endless(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})


async def large(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(2**25)})


async def streamed(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for left in reversed(range(32)):
        await send({"type": "http.response.body", "body": bytes(2**20), "more_body": left > 0})


def test_who_never_finishes_a_request_is_cut_off_and_who_asks_again_is_not(monkeypatch):
    monkeypatch.setattr(server_module, "_IDLE", 3)
    with serving(hello) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=120) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\na")
            often = HTTPConnection("127.0.0.1", port, timeout=120)
            often.auto_open = False
            often.connect()
            while not select.select([slow], [], [], 0.05)[0]:
                often.request("GET", "/")
                assert often.getresponse().read() == b"hello"
            assert slow.recv(1) == b""
            often.close()


def test_who_sends_on_after_the_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(server_module, "_LINGER", 0.25)
    with serving(hello) as (port, _), socket.create_connection(("127.0.0.1", port), timeout=120) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        assert client.recv(1) == b"H"
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"1000\r\n" + bytes(0x1000) + b"\r\n")


@pytest.mark.parametrize("answer", [streamed, large])
def test_who_does_not_read_an_answer_is_cut_off_and_who_reads_slowly_is_not(answer, monkeypatch):
    monkeypatch.setattr(server_module, "_IDLE", 3)
    monkeypatch.setattr(server_module, "_MIN_READ", 2**15)
    cut_off = threading.Event()
    abort = _SelectorSocketTransport.abort
    monkeypatch.setattr(_SelectorSocketTransport, "abort", lambda self: (cut_off.set(), abort(self))[1])
    with serving(answer) as (port, _), ExitStack() as stack:
        deaf, slow = (stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=120)) for _ in range(2))
        for client in (deaf, slow):
            client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        content = stack.enter_context(slow.makefile("rb"))
        while not cut_off.wait(0.2):
            assert len(content.read(2**18)) == 2**18
        read = 0
        while data := deaf.recv(2**20):
            read += len(data)
        assert read < 2**25


def test_a_server_is_bounded_and_says_nothing_of_itself(monkeypatch):
    made = []

    class Made:
        def __init__(self, config, stop, on_stop):
            made.append(config)

        def run(self, sockets):
            pass

    monkeypatch.setattr(server_module, "_Server", Made)
    with bound("127.0.0.1", 0) as listener:
        server_module.serve_until_signal(hello, listener, lambda: None, patience=2.5)
    config = made[0]
    assert (config.timeout_graceful_shutdown, config.limit_concurrency, config.timeout_keep_alive) == (3, 1000, 15)
    assert not (config.proxy_headers or config.server_header or config.access_log) and config.ws == "none"


def test_both_modes_begin_with_what_the_command_line_says(monkeypatch, tmp_path):
    limits, given = Limits(timeout=2.0), dict(model=None, host="127.0.0.1", port=0)
    monkeypatch.setattr(start, "load_served", lambda cfg, out_dir, file: Model(Bright(), FACTS))
    monkeypatch.setattr(start, "Service", lambda model, limits, **options: MagicMock(options=options))
    for asked, expected in ((None, 1), (5, 5)):
        with start.started({}, tmp_path, **given, batch_size=asked, wait_ms=50, limits=limits) as (_, service):
            assert service.options == {"batch_size": expected, "wait": 0.05}
        service.close.assert_called_once()
    with pytest.raises(ZeroDivisionError):
        with start.started({}, tmp_path, **given, batch_size=1, wait_ms=50, limits=limits) as (_, service):
            raise ZeroDivisionError
    service.close.assert_called_once()
    with pytest.raises(UserError, match="wait_ms=2000 reaches the request timeout"):
        with start.started({}, tmp_path, **given, batch_size=1, wait_ms=2000, limits=limits):
            pass


def test_who_does_not_read_his_answer_does_not_hold_up_a_stop(monkeypatch):
    monkeypatch.setattr(server_module, "_LAST_BYTES", 0)
    with serving(endless, timeout_graceful_shutdown=0.1) as (port, end):
        with socket.create_connection(("127.0.0.1", port)) as deaf:
            deaf.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            deaf.recv(1)
            assert end()


@pytest.fixture
def server(trained_once, tmp_path):
    """A server in a process of its own, and its port."""
    words = [f"resume={trained_once}/segmenter", "engine=cpu", "mode.port=0", "mode.limits.timeout=120"]
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


def answered(port, body):
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.connect()
    except ConnectionRefusedError:
        return "refused"
    try:
        connection.request("POST", "/segment?format=ids", body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.heavy
def test_nothing_is_lost_when_it_is_stopped_under_load(server):
    process, port = server
    bodies = [encoded(picture(40 + number % 4, 60, seed=number)) for number in range(20)]
    wanted = {number: answered(port, body) for number, body in enumerate(bodies)}
    assert {status for status, _ in wanted.values()} == {200}
    got = []

    def client(first):
        for number in itertools.count(first):
            answer = answered(port, bodies[number % 20])
            got.append((number % 20, answer))
            if answer == "refused":
                return

    threads = [threading.Thread(target=client, args=(first,), daemon=True) for first in range(50)]
    for thread in threads:
        thread.start()
    for _ in range(10):  # clients that send half a request, or go before the answer
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"POST /segment HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf")
    while len(got) < 100:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0
    for thread in threads:
        thread.join(300)
    whole = [(number, answer) for number, answer in got if answer != "refused"]
    assert len(whole) > 50 and len(got) - len(whole) == 50
    assert all(answer == wanted[number] for number, answer in whole)


@pytest.mark.heavy
def test_a_second_signal_ends_it_at_once(server):
    process, port = server
    with socket.create_connection(("127.0.0.1", port)) as slow:  # its request would be waited for
        slow.sendall(b"POST /segment HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf")
        assert answered(port, b"no image")[0] == 400  # by then it has read the first half of the other request
        process.send_signal(signal.SIGTERM)
        assert any("Stopping after the current requests" in line for line in process.stdout)
        time.sleep(3)  # a signal within two seconds of the first is the same one
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 143


def test_a_server_without_a_model_says_what_is_missing(tmp_path):
    done = call(tmp_path, "mode=serve", "engine=cpu", "mode.port=0")
    assert done.status == 1 and "resume is not set" in done.err and not list(tmp_path.glob("outputs/*/*"))
    both = call(tmp_path, "mode=serve", "engine=cpu", "mode.port=0", "mode.model=a.onnx", "mode.limits.queue=0")
    assert both.status == 1 and "mode.limits.queue=0 is out of range" in both.err
    wrong = call(tmp_path, "mode=app", "engine=cpu", "mode.port=0", "tracker.short_side=0", "mode.hosts=[]")
    assert wrong.status == 1 and "short_side=0 is out of range" in wrong.err
    long = call(tmp_path, "mode=serve", "mode.port=0", "mode.wait_ms=5000", "mode.limits.timeout=5")
    assert "mode.wait_ms=5000 reaches the request timeout (mode.limits.timeout=5 seconds)" in long.err
