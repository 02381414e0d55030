"""Uploads and results of a page are reached by its token only."""

import re
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dinoseg.extensions.serving.app import App
from dinoseg.extensions.serving.page import PageContext


@pytest.fixture
def pages(tmp_path):
    """Two pages, and a client of their routes."""
    app = App(PageContext(None, tmp_path, None, max_mib=0.01, max_seconds=1.0))
    for token in ("one", "two"):
        folder = tmp_path / f"folder_{token}"
        page = SimpleNamespace(folder=folder, uploads=[], files={}, is_busy=False, is_receiving=False)
        page.add_upload = page.uploads.append
        app.pages[token] = page
    application = FastAPI()
    application.post("/upload/{token}")(app.receive_upload)
    application.get("/files/{token}/{name}")(app.send_file)
    with TestClient(application) as ask:
        yield app.pages, ask


def test_upload_is_stored_under_a_generated_name(pages, tmp_path):
    known, ask = pages
    headers = {"content-disposition": 'attachment; filename="../../../etc/passwd"'}
    assert ask.post("/upload/one?name=../../x", content=b"content", headers=headers).status_code == 204
    (path,) = known["one"].uploads
    assert path.read_bytes() == b"content" and re.fullmatch("[0-9a-f]{32}", path.name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [path] and path.parent == known["one"].folder
    assert known["one"].folder.stat().st_mode & 0o077 == 0


def test_upload_never_changes_a_file_of_the_page(pages):
    known, ask = pages
    for content in (b"first", b"second"):
        assert ask.post("/upload/one", content=content).status_code == 204
    assert ask.post("/upload/one", content=bytes(20_000)).status_code == 413
    assert [path.read_bytes() for path in known["one"].uploads] == [b"first", b"second"]
    assert sorted(known["one"].folder.iterdir()) == sorted(known["one"].uploads) and not known["one"].is_receiving


def test_uploads_are_refused_when_large_busy_or_of_no_page(pages):
    known, ask = pages
    assert ask.post("/upload/one", content=(bytes(1000) for _ in range(20))).status_code == 413
    known["two"].is_busy = True
    assert ask.post("/upload/two", content=b"x").status_code == 409 and not known["two"].folder.exists()
    assert ask.post("/upload/three", content=b"x").status_code == 409
    known["one"].is_receiving = True
    assert ask.post("/upload/one", content=b"x").status_code == 409


def test_files_of_another_page_are_not_accessible(pages, tmp_path):
    known, ask = pages
    (tmp_path / "overlay.mp4").write_bytes(bytes(range(100)))
    known["one"].files |= {"overlay.mp4": tmp_path / "overlay.mp4", "image.jpg": b"image", "mask.png": lambda: b"mask"}
    assert ask.get("/files/one/image.jpg").content == b"image"
    assert ask.get("/files/one/mask.png").content == b"mask"
    part = ask.get("/files/one/overlay.mp4", headers={"range": "bytes=10-19"})  # browsers seek so
    assert part.status_code == 206 and part.content == bytes(range(10, 20))
    for address in ("two/mask.png", "three/mask.png", "one/upload", "one/..%2foverlay.mp4", "one/%2fetc%2fpasswd"):
        assert ask.get(f"/files/{address}").status_code == 404
