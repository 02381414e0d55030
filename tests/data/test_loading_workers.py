"""The number of loading processes."""

import pytest

from dinoseg.data import loader
from dinoseg.training.engine import Engine
from dinoseg.utils import cores


@pytest.mark.parametrize(
    ("device", "environment", "workers"),
    [
        ("cuda", {}, 8),
        ("cuda", {"WORLD_SIZE": "3"}, 4),
        ("cuda", {"WORLD_SIZE": "16"}, 2),
        ("cuda", {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "16"}, 6),
        ("mps", {}, 8),
        ("cpu", {}, 2),
    ],
)
def test_workers_follow_from_device_cores_and_ranks(device, environment, workers, monkeypatch):
    monkeypatch.setattr(cores, "_usable", lambda: set(range(12)))
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loader.count_workers(device) == workers


def test_engine_resolves_auto_and_keeps_a_number():
    assert Engine("cpu", "fp32", workers="auto").workers == 2
    assert Engine("cpu", "fp32", workers=0).workers == 0


@pytest.mark.parametrize(("workers", "cores", "told"), [(16, 1, 0), (17, 1, 1), (32, 8, 0), (33, 8, 1)])
def test_too_many_loading_processes_are_reported(workers, cores, told, monkeypatch, caplog):
    monkeypatch.setattr(loader, "cores_here", lambda: cores)
    loader.warn_of_many(workers)
    assert len(caplog.messages) == told
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    if workers == 32:
        loader.warn_of_many(workers)
        assert "engine.workers=32 starts 128 loading processes on 8 processors" in caplog.text
