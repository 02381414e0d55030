"""mode=bench tells how fast a recipe is, in figures that fit one another."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SLOTS, SMALL, call, in_this_process, succeed, write_data

from dinoseg.config.plain import to_container
from dinoseg.extensions.auto import bench_mode as benching
from dinoseg.extensions.auto.bench_mode import SpeedMeasurement
from dinoseg.extensions.auto.trial import Trial

WORDS = ("mode=bench", *SMALL, "engine.precision=fp32", "hydra.run.dir=run")
QUICK = ("mode.steps=3", "mode.images=4", "mode.warmup=1")


@pytest.fixture
def here(monkeypatch):
    """Time in this process: what a process of its own does is tested beside it."""
    monkeypatch.setattr(benching, "run_in_process", in_this_process)


def run_bench(where, *words, start=WORDS):
    done = succeed(where, *start, *QUICK, *words)
    return json.loads((where / "run/bench.json").read_text()), done.out


def test_figures_of_noise_need_no_data(tmp_path, here):
    found, out = run_bench(tmp_path, "mode.synthetic=true", "trainer.accumulate=2")
    assert found["data"] == "synthetic" and found["device"] == "cpu" and found["precision"] == "fp32"
    assert found["train"]["images"] == 4 and found["train"]["size"] == [32, 48] and found["inference"]["images"] == 1
    for figures in (found["train"], found["inference"]):
        assert 0 < figures["latency_p50_s"] <= figures["latency_p95_s"] and figures["data_wait"] is None
        assert isinstance(figures["peak_bytes"], int) and figures["model_flops"] > 10_000
        rate = figures["images_per_s"] * figures["model_flops"] / figures["images"]
        assert figures["model_flops_per_s"] == pytest.approx(rate)
        assert figures["share_of_matrix_peak"] == pytest.approx(rate / found["matrix_peak_flops_per_s"])
        assert f"{figures['images_per_s']:.3g}" in out
    assert found["train"]["model_flops"] > 5 * found["inference"]["model_flops"]


@pytest.mark.heavy
def test_data_that_is_read_is_waited_for(tmp_path, here):
    write_data(tmp_path / "data", size=(40, 56))
    found, _ = run_bench(tmp_path)
    assert found["data"] == "folder" and 0 < found["train"]["data_wait"] < 1
    assert found["train"]["size"] == [32, 48] and found["inference"]["size"] == [40, 56]


@pytest.mark.heavy
def test_slots_of_clips_are_timed(tmp_path, here):
    words = (*SLOTS[1:], "mode=bench", "hydra.run.dir=run")
    found, _ = run_bench(tmp_path, "mode.synthetic=true", start=words)
    assert found["train"]["model_flops"] > 4 * found["inference"]["model_flops"] > 10_000  # clips of four frames


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("engine.device=cuda", "engine.device=cuda"),
        ("engine.devices=2", "engine.devices=2: this mode runs on 1"),
        ("mode.steps=0", "mode.steps=0"),
        ("data.root=nowhere", "nowhere"),
        ("trainer=distil teacher=run", "trainer=distil is not supported: its step also uses images without masks"),
    ],
)
def test_invalid_bench_options_are_refused(tmp_path, here, line, message):
    done = call(tmp_path, *WORDS, *line.split())
    assert done.status == 1 and message in done.err and "Traceback" not in done.err, done.err


def test_bench_shares_use_the_best_rate_and_check_the_config(compose, tmp_path, monkeypatch):
    timed = iter([SpeedMeasurement("cpu", "fp32", 1, (8, 8), [1.0], None, 0, 5, peak) for peak in (10.0, 20.0)])
    monkeypatch.setattr(benching, "run_in_process", lambda work, item: next(timed))
    cfg = compose(*SMALL)
    found = benching.bench(cfg, out_dir=tmp_path)
    assert found["matrix_peak_flops_per_s"] == 20 and found["train"]["share_of_matrix_peak"] == 0.25


def test_killed_bench_process_is_reported_as_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(benching, "run_in_process", lambda work, item: None)
    done = call(tmp_path, *WORDS, "mode.synthetic=true")
    assert done.status == 1 and "killed, most likely because memory ran out. mode=plan" in done.err


def test_figures_follow_from_seconds():
    figures = SpeedMeasurement("cpu", "fp32", 6, (8, 8), [1.0, 2.0, 3.0, 4.0], 0.5, 7, 100, 1000.0).figures(200.0)
    assert (figures["latency_p50_s"], figures["latency_p95_s"]) == (2.5, pytest.approx(3.85))
    assert figures["images_per_s"] == 2.4 and figures["model_flops_per_s"] == 40.0
    assert figures["share_of_matrix_peak"] == 0.2


def test_operations_of_a_step_are_those_of_all_its_batches(compose, monkeypatch):
    monkeypatch.setattr(benching, "try_steps", lambda *_, **__: Trial([2.0, 2.0], [1.0, 0.0], peak=5))
    monkeypatch.setattr(benching, "step_flops", lambda parts, samples, bf16: 10 * samples)
    monkeypatch.setattr(benching, "matrix_peak", lambda *_, **__: 1.0)
    values = to_container(compose(*SMALL, "trainer.accumulate=3"))
    timed = benching.time_training(values, steps=2, warmup=0, synthetic=True)
    assert (timed.images, timed.flops, timed.waited, timed.peak_bytes) == (6, 60, None, 5)


def test_images_are_predicted_in_turn_and_timed_once_warm(compose, monkeypatch):
    seen = []
    images = [np.full((8, 9, 3), value, np.uint8) for value in (0, 1)]
    predictor = SimpleNamespace(ids=lambda given: seen.append(given[0].max()))
    monkeypatch.setattr(benching, "Predictor", lambda *_: predictor)
    monkeypatch.setattr(benching, "matrix_peak", lambda *_, **__: 1.0)
    monkeypatch.setattr(benching.Builder, "dataset", lambda *_: None)
    monkeypatch.setattr(benching, "first_images", lambda _: images)
    timed = benching.time_prediction(to_container(compose(*SMALL)), images=3, warmup=2, synthetic=False)
    assert seen == [0, 0, 1, 0, 1, 0] and len(timed.seconds) == 3  # the first for its operations
    assert (timed.images, timed.size) == (1, (8, 9))


def test_images_have_the_size_of_the_first_one():
    data = [{"image": torch.zeros(size, dtype=torch.uint8)} for size in ((3, 8, 9), (3, 9, 8), (3, 8, 9))]
    assert [image.shape for image in benching.first_images(data)] == [(8, 9, 3)] * 2
