"""Overlays are played by a real browser."""

import http.server
import threading
from functools import partial

import pytest
from chromium import opened_page
from films import write_film

from dinoseg.inference.video_file import VideoReader
from dinoseg.inference.video_writer import VideoWriter

pytestmark = pytest.mark.heavy


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server_url(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_overlay_plays_in_a_browser(server_url, tmp_path):
    source = write_film(tmp_path / "in.mkv", frames=48)
    with (
        VideoReader(source) as reader,
        VideoWriter(tmp_path / "out.mp4", reader.rate, reader.size, like=reader.traits) as writer,
    ):
        for frame, time in reader.timed_frames():
            writer.write(frame, time)
    (tmp_path / "page.html").write_text("<link rel=icon href=data:,><video id=v src=out.mp4 muted></video>")
    with opened_page(f"{server_url}/page.html") as page:
        page.wait_for_function("document.getElementById('v').readyState >= 2", timeout=120_000)
        page.evaluate("document.getElementById('v').play()")
        page.wait_for_function("document.getElementById('v').currentTime > 0.5", timeout=120_000)
        state = page.evaluate("(v => [v.videoWidth, v.videoHeight, v.error])(v)")
        assert state == [64, 48, None] and page.complaints == []
