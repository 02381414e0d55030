"""The CUDA kernel: in Triton's interpreter against float64, compiled without a device, and when it is used."""

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from full_logits import all_logits
from pretended_cuda import Pretended
from test_full_resolution import LOSSES, WEIGHTS, gradient, random_case

from dinoseg.core.shapes import WeightedMasks
from dinoseg.losses import full_resolution, fused
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.fused import Fused, FusedOrTiled, KernelSpec
from dinoseg.losses.overlap import Dice, Tversky

CASES = [  # as of test_full_resolution: padded, masks smaller than the grid, one pixel, nothing labelled
    ((5, 9), 4, (11, 10), 0.2),
    ((8, 4), 4, (1, 5), 0.0),
    ((1, 1), 8, (1, 1), 0.0),
    ((4, 4), 4, (4, 4), 2.0),
]
KERNELS = ("cross-entropy", "smoothed", "tversky")


def apart(name, case, device="cpu"):
    """Return how far a loss and its gradient are from those of all logits at once in float64: the larger share, ()."""
    loss, reference = LOSSES[name]
    prediction, batch = random_case(*case, seed=3, dtype=torch.float32)
    wanted = reference(all_logits(prediction.grid, case[2], prediction.valid), batch.mask.long())
    there = replace(prediction, grid=prediction.grid.detach().to(device).requires_grad_())
    value = deepcopy(loss).to(device)(there, batch.to(torch.device(device)))[0]
    pairs = ((value, wanted), (gradient(3 * value, there.grid), 3 * gradient(wanted, prediction.grid)))
    with torch.no_grad():
        shares = [(mine.cpu() - other).abs().max() / other.abs().max().clamp(min=1e-30) for mine, other in pairs]
    return torch.stack(shares).max()  # no number, if either is none


def print_distances_interpreted():
    """Hold losses that go by the kernel to all logits at once in float64, and print how far they are apart at most."""
    Fused.takes = lambda self, grid: True
    full_resolution.FusedOrTiled = lambda kernel, tiles: kernel
    most = torch.stack([apart(name, case) for name in KERNELS for case in CASES]).max()
    prediction, batch = random_case(*CASES[0], seed=3, dtype=torch.float32)
    batch.mask[0, 0, 0] = 9
    print(float(most), *(float(LOSSES[name][0](prediction, batch)[0].detach()) for name in KERNELS[::2]))


def print_kernel_sizes():
    """Compile the kernel to machine code for A100 and H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from dinoseg.losses.fused_kernel import add_up

    numbers = dict.fromkeys(("scores", "reads", "of_classes", "sums", "slopes"), "*fp32")
    constants = ("CLASSES", "PIXELS", "ENTROPY", "GRADIENT")
    signature = numbers | {"mask": "*u8", "starts": "*i32", "shape": ("i32",) * 6, "smoothing": "fp32"}
    signature = {name: "constexpr" if name in constants else signature[name] for name in add_up.arg_names}
    for architecture, entropy in ((80, True), (90, False)):
        source = ASTSource(add_up, signature, dict(zip(constants, (32, 64, entropy, True), strict=True)))
        options = {"enable_fp_fusion": True}
        print(len(compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]))


def said_by(function, tmp_path, **environment):
    pytest.importorskip("triton", reason="Triton has no wheels for this system")
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", f"import test_fused; test_fused.{function}()"],
        env={**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


@pytest.mark.heavy
@pytest.mark.slow
def test_kernel_equals_full_logits_and_gives_nan_for_bad_labels(tmp_path):
    apart, *outsiders = said_by("print_distances_interpreted", tmp_path, TRITON_INTERPRET="1")
    assert 0 < apart < 1e-6
    assert all(value != value for value in outsiders)


@pytest.mark.heavy
@pytest.mark.slow
def test_kernel_compiles_for_other_devices(tmp_path):
    assert min(said_by("print_kernel_sizes", tmp_path)) > 10_000


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", [*CASES, ((33, 47), 2, (512, 700), 0.2), ((64, 64), 1, (1024, 1024), 0.5)])
def test_kernel_on_a_gpu_equals_full_logits(monkeypatch, name, case):
    taken = []
    monkeypatch.setattr(Fused, "takes", lambda self, grid: grid.is_cuda)
    monkeypatch.setattr(full_resolution, "FusedOrTiled", lambda kernel, tiles: taken.append(kernel) or kernel)
    assert apart(name, case, "cuda") <= 2e-6
    assert taken


@pytest.fixture
def run_kernel(monkeypatch):
    """Replace the kernel by a mock, used at any size, on devices where none has failed yet."""
    monkeypatch.setattr(fused, "_failed", set())
    monkeypatch.setattr(Fused, "takes", lambda self, grid: True)
    monkeypatch.setattr(Fused, "sums", Mock())
    return Fused.sums


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("long\nptxas: no such file"), "ptxas: no such file"), (ImportError(), "ImportError")],
)
def test_failing_kernel_is_replaced_by_tiles_with_one_warning(run_kernel, error, reason, monkeypatch, caplog):
    run_kernel.side_effect = error
    prediction, batch = random_case(*CASES[0], seed=3, dtype=torch.float32)

    def find_losses():
        values = [LOSSES[name][0](prediction, batch)[0] for name in KERNELS]
        return [*values, *(gradient(value, prediction.grid) for value in values)]

    found = find_losses()
    assert run_kernel.call_count == 1 and len(caplog.messages) == 1
    assert f"does not run here ({reason}); using torch" in caplog.text
    monkeypatch.setattr(Fused, "takes", lambda self, grid: False)
    assert all(map(torch.equal, found, find_losses()))


def test_kernel_that_runs_needs_no_tiles(run_kernel):
    tiles, grid = Mock(), torch.zeros(1, 3, 2, 2)
    for upstream in (None, torch.ones(1)):
        FusedOrTiled(Fused(grid, (1.0, 1.0), 255, KernelSpec()), tiles).sums([grid], upstream)
    assert [call.args for call in run_kernel.mock_calls] == [([grid], None), ([grid], torch.ones(1))]
    assert not tiles.mock_calls


def test_kernel_passes_on_out_of_memory_errors(run_kernel):
    run_kernel.side_effect = torch.OutOfMemoryError("none")
    for _ in range(2):  # the kernel is tried again
        with pytest.raises(torch.OutOfMemoryError):
            CrossEntropy(WEIGHTS)(*random_case(*CASES[0], seed=3, dtype=torch.float32))
    assert run_kernel.call_count == 2


def test_kernel_needs_cuda_and_grids_smaller_than_masks(monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheels for this system")
    way = Fused(torch.zeros(1, 32, 32, dtype=torch.uint8), (1.0, 1.0), 255, KernelSpec(WEIGHTS))
    grid = torch.zeros(1, 5, 8, 8)
    assert not way.takes(Pretended(grid))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not way.takes(grid)
    assert way.takes(Pretended(grid))
    assert not way.takes(Pretended(torch.zeros(1, 5, 8, 9)))
    assert not way.takes(Pretended(grid.double()))
    assert way.takes(Pretended(torch.zeros(1, 1024, 8, 8)))
    assert not way.takes(Pretended(torch.zeros(1, 1025, 8, 8)))
    with pytest.raises(RuntimeError, match=r"size of the tensor \(4\) must match the existing size \(5\)"):
        way.sums([torch.zeros(1, 4, 8, 8)], None)


def test_losses_request_the_kernel_with_their_weights(monkeypatch):
    forms = []
    monkeypatch.setattr(Fused, "takes", lambda self, grid: True)
    monkeypatch.setattr(full_resolution, "FusedOrTiled", lambda kernel, tiles: forms.append(kernel) or tiles)
    prediction, batch = random_case(*CASES[0], seed=0, dtype=torch.float32)
    made = CrossEntropy(WEIGHTS, label_smoothing=0.2), Dice(WEIGHTS), Tversky(WEIGHTS), Focal(WEIGHTS)
    for loss in (*made, CrossEntropy(WEIGHTS, hard_fraction=0.5)):
        loss(prediction, batch)
    assert [(way.form.weights is not None, way.form.smoothing) for way in forms] == [(True, 0.2), *[(False, 0.0)] * 2]
    assert all(way.mask is batch.mask and way.valid == prediction.valid and way.ignore_index == 255 for way in forms)
    grid = prediction.grid
    shares = torch.ones(2, 5, 5)
    CrossEntropy(WEIGHTS)(replace(prediction, grid=None, masks=WeightedMasks(grid, shares)), batch)
    assert len(forms) == 3  # a mixture goes by tiles
