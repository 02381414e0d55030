"""Training and tracking on a pretended MPS device, which refuses what torch 2.9 refuses there."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import assert_refused
from pretended_cuda import Pretended, on_cuda, pretended_engine
from pretended_mps import RefusedByMps, pretended_mps
from test_cuda_matrix import PARTS, cell
from test_cuda_paths import tiny, train
from test_matrix import make_batch
from tiny_parts import tiny_vit

from dinoseg.extensions.auto.trial import synchronize
from dinoseg.extensions.tracking.propagation.settings import PropagationSettings
from dinoseg.extensions.tracking.propagation.tracker import PropagationTracker
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.points import sample_maps
from dinoseg.training.engine import join_process_group
from dinoseg.training.meter import peak_memory, used_memory
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.step import StepOutput

MPS = torch.device("mps")
train_on_mps = partial(train, device=pretended_mps)


def test_training_on_mps_equals_training_on_a_cpu(tmp_path):
    options = {"plain": True, "clip": 0.5}
    there, here = (train_on_mps(tmp_path / str(cuda), *tiny(), cuda=cuda, **options) for cuda in (True, False))
    assert there.error is None and there.step == 3
    for name, value in here.state.items():
        torch.testing.assert_close(there.state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize(("head", "loss", "adapter"), PARTS)
def test_each_part_trains_on_pretended_mps(tmp_path, head, loss, adapter):
    """With a validation; a checkpoint is there at the end, and losses were finite."""
    done = train_on_mps(tmp_path, *cell(head, adapter, loss), steps=2, val_every=2, log_every=1, ema=0.5)
    assert done.error is None and done.step == 2 and (tmp_path / "last.safetensors").exists()


def test_propagation_of_masks():
    torch.manual_seed(0)
    mask = np.zeros((48, 64), np.uint8)
    mask[8:40, 8:40] = 3
    with pretended_mps():
        tracker = PropagationTracker(on_cuda(tiny_vit()), PropagationSettings(short_side=48, radius=2), device=MPS)
        tracked = tracker.track([np.zeros((48, 64, 3), np.uint8)] * 2, [mask, None])
    assert set(np.unique(tracked[1])) <= {0, 3}


def test_maps_are_sampled_as_with_the_padding_that_mps_lacks():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 1, 7, requires_grad=True)
    places = 3 * torch.rand(2, 50, 1, 2) - 1.5
    places[0, :4, 0] = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1 - 1 / 7, 0.0], [1 / 7 - 1, 0.0]])
    expected = F.grid_sample(maps.double(), places.double(), padding_mode="border", align_corners=False)
    (gradient,) = torch.autograd.grad(expected.square().sum(), maps)
    with pretended_mps():
        there = torch.nn.Parameter(Pretended(maps.detach()))
        found = sample_maps(there, Pretended(places))
        found.square().sum().backward()
    torch.testing.assert_close(found.memory, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.grad.memory, gradient, rtol=1e-4, atol=1e-4)


def test_clocks_and_memory_are_those_of_mps():
    with pretended_mps() as mps:
        synchronize(MPS)
        assert mps.calls["synchronize"] == 1
        batch = make_batch()
        output = StepOutput(torch.device("cpu"), None)
        micro = MicroBatches(pretended_engine(), CrossEntropy(torch.ones(3)), 1, 1, undo=lambda: None)
        for part in micro.split_step(iter([batch]), output):
            with micro.retry_batch():
                if len(part.names) > 1:
                    raise MemoryError
        assert mps.calls["empty_cache"] == 1
        assert peak_memory(MPS) == used_memory(MPS) == 0
        assert mps.calls["driver_allocated_memory"] == mps.calls["current_allocated_memory"] == 1


def test_several_ranks_on_mps_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    remedy = "Set engine.devices=1, or engine.device=cpu"
    assert_refused(lambda: join_process_group(MPS, 1.0, 1.0), "engine.devices=2: ", " a single process only", remedy)


def test_the_pretended_device_refuses():
    with pretended_mps() as mps:
        one = torch.ones(3, device="mps", requires_grad=True)
        places = one.new_zeros(1, 1, 1, 2)
        for refused in (
            lambda: one.double(),
            lambda: one.to("cpu", torch.float64),
            lambda: torch.ones(3, dtype=torch.float64, device="mps"),
            lambda: torch.ones(3, dtype=torch.float64).to("mps"),
            lambda: torch.ones(3).to("mps", non_blocking=True),
            lambda: one.detach().to("cpu", non_blocking=True),
            lambda: torch.ones(3).copy_(one.detach(), non_blocking=True),
            lambda: F.grid_sample(one.view(1, 1, 1, 3), places, padding_mode="border", align_corners=False),
        ):
            with pytest.raises(RefusedByMps):
                refused()
        torch.ones(3, dtype=torch.float64).to("mps", torch.float32)
        one.detach().cpu().double()
        F.grid_sample(one.view(1, 1, 1, 3), places, align_corners=False).sum().backward()
        assert mps.fallbacks == {"grid_sampler_2d_backward": 1}
