"""What a pass takes, what is free, and what is chosen by them."""

import logging
import re
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from tiny_parts import tiny_vit

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Prediction
from dinoseg.inference import auto, memory
from dinoseg.inference.auto import Auto
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.inference.windows import Whole
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.utils import cores
from dinoseg.utils.errors import UserError

CPU = torch.device("cpu")


def make_model(**options):
    torch.manual_seed(0)
    backbone = tiny_vit()
    return SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, 5), **options).eval()


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def watch(model):
    """Return a list that collects the sizes that the model's backbone is given."""
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    return seen


def make_predictor(model, strategy=None):
    return Predictor(model, CPU, nullcontext, *([] if strategy is None else [strategy]))


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}])
def test_memory_estimate_scales_from_small_inputs(options):
    model = make_model(**options)
    cost = memory.measure(model, 256, nullcontext)
    for size in ((160, 96), (320, 320)):
        batch = torch.zeros(1, 3, *size, dtype=torch.uint8)
        with torch.no_grad(), memory.PeakBytes() as peak:
            model(batch).class_ids()
        assert cost.of(1, model.input_size(size), size) == pytest.approx(peak.most, rel=0.25)
        assert cost.of(3, model.input_size(size), size) == 3 * cost.of(1, model.input_size(size), size)


def test_growth_of_explicit_attention_is_estimated():
    class Grows(torch.nn.Module):
        patch_size = 1
        scale = 1.0
        backbone = SimpleNamespace(channels=3)

        def forward(self, images, reduce):
            flat = images[0, 0].float().flatten()
            squares = flat[:, None] * flat
            return Prediction(squares[:1, :1, None, None], images.shape[-2:], (1.0, 1.0), upsample)

    cost = memory.measure(Grows(), 32, nullcontext)
    assert cost.squared == pytest.approx(4, rel=0.05) and cost.scores < 50
    assert cost.of(1, (100, 100), (1, 1)) == pytest.approx(4e8, rel=0.05)


def test_the_peak_is_that_of_tensors_that_live_at_once():
    with memory.PeakBytes() as peak:
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second[:10] * 2
        del second, third
        torch.ones(1500)
    assert peak.most == 8000 and peak.now == 0


@pytest.mark.parametrize(
    ("version", "lines", "files", "expected"),
    [
        ("v2", "0::/a/b\n", {"a/b": ("max", "70", "0"), "a": ("1000", "600", "100")}, 500),
        ("v2", "0::/a\n", {"a": ("100000", "1", "0")}, 4096),
        ("v1", "3:cpu:/a\n4:memory:/a\n", {"memory/a": ("900", "800", "50")}, 150),
        ("v2", "0::/gone\n", {}, 4096),
    ],
)
def test_free_memory_is_bounded_by_control_groups(tmp_path, monkeypatch, version, lines, files, expected):
    names = {"v2": ("memory.max", "memory.current", "inactive_file")}
    names["v1"] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, usage, dropped = names[version]
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(lines)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=4096))
    for folder, values in files.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / limit).write_text(f"{values[0]}\n")
        (tmp_path / folder / usage).write_text(f"{values[1]}\n")
        (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{dropped} {values[2]}\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(cores, "PROC", tmp_path)
    monkeypatch.setattr(cores, "GROUPS", tmp_path)
    assert memory.free_bytes(CPU) == expected


@pytest.fixture
def free(monkeypatch):
    """Set what is free."""
    return lambda value: monkeypatch.setattr(auto, "free_bytes", lambda device: value)


def test_images_that_fit_are_seen_whole_and_nothing_is_computed(free, monkeypatch, caplog):
    monkeypatch.setattr(auto, "measure", None)
    free(2**40)
    for options in ({}, {"flips": "horizontal", "scales": (1.0, 2.0)}):
        found, expected = (
            make_predictor(make_model(), strategy).probabilities([picture(100, 90)])
            for strategy in (Auto((32, 32), **options), Whole(**options))
        )
        assert torch.equal(found, expected) and not caplog.messages
    assert not torch.equal(found, make_predictor(make_model()).probabilities([picture(100, 90)]))


def test_large_images_use_windows_and_log_it_once(free, caplog):
    model = make_model()
    need = memory.measure(model, 32, nullcontext).of(1, (100, 90), (100, 90))
    seen = watch(model)
    predictor = make_predictor(model, Auto((32, 48), memory=0.5))
    with caplog.at_level(logging.INFO):
        free(2 * need + 2)
        predictor.ids([picture(100, 90)])
        assert seen[-1] == (100, 90) and caplog.messages[0].endswith("are available: whole images.")
        caplog.clear()
        seen.clear()
        free(need)
        predictor.ids([picture(100, 90)])  # as decided before
        assert seen == [(100, 90)] and not caplog.messages
        predictor.ids([picture(120, 90)])
        predictor.ids([picture(150, 90)])
    assert set(seen[1:]) == {(32, 48)}
    (message,) = caplog.messages
    assert message.startswith("inference=auto: an image of 90 x 120 (width x height) would need about ")
    assert re.search(r"about \d+\.[1-9] MiB in one pass; \d+\.[1-9] MiB are available", message)
    assert "it is predicted in windows of 48 x 32" in message


def test_auto_windows_have_the_scale_of_whole_images(free):
    model = make_model()
    limit_to_trained_size(model, TrainedSizes(typical=64, largest=80))
    seen = watch(model)
    free(0)
    probabilities = make_predictor(model, Auto((64, 64))).probabilities([picture(200, 100)])
    assert seen[2:] == [(64, 32)] and probabilities.shape == (1, 5, 200, 100)


def test_largest_scale_decides_if_an_image_fits(free):
    model = make_model()
    cost = memory.measure(model, 32, nullcontext)
    free((cost.of(1, (100, 90), (100, 90)) + cost.of(1, (600, 540), (100, 90))) / 2)
    seen = watch(model)
    for scales, first in (((1.0,), (100, 90)), ((1.0, 6.0), (32, 48))):
        seen.clear()
        make_predictor(model, Auto((32, 48), memory=1.0, scales=scales)).ids([picture(100, 90)])
        assert [size for size in seen if size[0] != size[1]][0] == first  # squares are those that are measured


def small_memory(model, pixels):
    """Let passes over more pixels fail as torch's do."""

    def hook(_, given):
        if given[0].shape[-2:].numel() * len(given[0]) > pixels:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    model.backbone.register_forward_pre_hook(hook)
    return model


def test_auto_falls_back_to_windows_when_out_of_memory(free, caplog):
    free(2**40)
    strategy = Auto((32, 48))
    predictor = make_predictor(small_memory(make_model(), 4 * 32 * 48), strategy)
    windows = make_predictor(make_model(), strategy.windows)
    whole = make_predictor(make_model())
    assert (predictor.ids([picture(100, 90)]) == windows.ids([picture(100, 90)])).all()
    (message,) = caplog.messages
    words = "inference=auto: not enough memory for an image of 90 x 100 (width x height) in one pass: "
    assert message.startswith(words)
    assert (predictor.ids([picture(120, 90)]) == windows.ids([picture(120, 90)])).all() and len(caplog.messages) == 1
    assert (predictor.ids([picture(40, 50)]) == whole.ids([picture(40, 50)])).all()
    images = torch.from_numpy(picture(100, 90)).permute(2, 0, 1)[None]
    sizes = predictor.run_bands(images, lambda bands: [band.scores().shape[2:] for band in bands], size=(50, 45))
    assert sum(rows for rows, _ in sizes) == 50 and {columns for _, columns in sizes} == {45}


def test_insufficient_memory_is_one_message(free):
    free(2**40)
    words = ("predict 2 images of 90 x 100 ", "can't alloc", "inference=windows")
    for strategy in (Auto((32, 48)), Whole(), Auto((32, 48)).windows):
        predictor = make_predictor(small_memory(make_model(), 10), strategy)
        for ask in (predictor.ids, predictor.probabilities):
            assert_refused(lambda ask=ask: ask([picture(100, 90)] * 2), *words, error=memory.OutOfMemory)
    broken = make_model()
    broken.backbone.register_forward_pre_hook(Mock(side_effect=RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        make_predictor(broken, Auto((32, 48))).ids([picture(100, 90)])


def test_address_space_limit_bounds_free_memory(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/statm").write_text("3 2 1 1 0 1 0\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(cores, "PROC", tmp_path)
    monkeypatch.setattr(cores, "GROUPS", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10 * resource.getpagesize(), -1))
    assert memory.free_bytes(CPU) == 7 * resource.getpagesize()


def test_batch_and_output_size_count_towards_memory(free):
    model = make_model()
    free(1.5 * memory.measure(model, 32, nullcontext).of(1, (100, 90), (100, 90)))
    images = torch.from_numpy(picture(100, 90)).permute(2, 0, 1)[None]
    seen = watch(model)
    for count, size, whole in ((1, None, True), (2, None, False), (1, (1000, 900), False)):
        seen.clear()
        predictor = make_predictor(model, Auto((32, 48), memory=1.0))
        predictor.run_bands(images.expand(count, -1, -1, -1), lambda bands: [band.size for band in bands], size=size)
        assert ((100, 90) in seen) == whole


def test_free_gpu_memory_includes_unused_memory_of_torch(monkeypatch):
    for name, value in (("mem_get_info", (10, 99)), ("memory_reserved", 5), ("memory_allocated", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_bytes(torch.device("cuda")) == 13


def test_memory_error_of_python_is_reported():
    broken = make_model()
    broken.backbone.register_forward_pre_hook(Mock(side_effect=MemoryError))
    words = ("of 90 x 100 ", "none left")
    assert_refused(lambda: make_predictor(broken).ids([picture(100, 90)]), *words, error=memory.OutOfMemory)


def test_probabilities_are_float32_in_any_precision():
    predictor = Predictor(make_model(), CPU, lambda: torch.autocast("cpu", torch.bfloat16))
    probabilities = predictor.probabilities([picture(19, 30)] * 2)
    ids = predictor.ids([picture(19, 30)] * 2)
    assert probabilities.dtype == torch.float32 and ids.shape == (2, 19, 30) and ids.dtype == np.uint8


def test_windows_are_placed_as_stated():
    assert Auto(48, stride=[32, 20]).windows.starts(1, 100) == [0, 20, 40, 52]
    assert Auto(48, placement="even").windows.starts(0, 100) == [0, 26, 52]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "none left"),
        (
            RuntimeError("Caught RuntimeError in worker 0.\n  Traceback\n  out of memory: 7 GiB\n"),
            "out of memory: 7 GiB",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "[enforce fail] DefaultCPUAllo"),
    ],
)
def test_out_of_memory_error_quotes_the_relevant_line(error, reason):
    found = memory.as_out_of_memory(error)
    assert isinstance(found, memory.OutOfMemory) and str(found).startswith(f"Out of memory ({reason}")


def test_other_errors_are_no_shortage():
    assert memory.as_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_reason_of_another_error_is_its_first_line():
    assert memory.reason_of(UserError("a mask is missing\n- of 3.png")) == "a mask is missing"
