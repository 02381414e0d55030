from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from mistakes import assert_refused, refusals
from pretended_cuda import pretended_engine
from small_trainings import segmenter
from torch import nn

from dinoseg.models.heads.linear import LinearHead
from dinoseg.training import sharding
from dinoseg.training.engine import Engine
from dinoseg.training.loss_scale import LossScale
from dinoseg.utils.devices import choose_device


def test_auto_is_the_best_device_there_is():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_unavailable_device_is_refused_with_the_available_ones():
    assert_refused(lambda: Engine("cuda"), "engine.device=cuda is not available here. This machine has: ", "cpu")


def test_each_rank_needs_its_own_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 2).type == "cuda" and choose_device("cpu", 3).type == "cpu"
    assert_refused(lambda: choose_device("auto", 3), "engine.devices=3 needs one CUDA device each", "machine has 2")


class SlotHead(LinearHead):
    no_classes = "slots"


def shard(model, quantised=()):
    with patch.object(sharding, "quantised_names", lambda _: quantised):
        sharding.shard(model, torch.device("cpu"), 2)


def shard_compiled():
    with patch.object(Engine, "world_size", 2):
        Engine("cpu", "fp32", sharding="fsdp", compile=True)


test_message_names_value_and_remedy = refusals(
    {
        "precision": (lambda: Engine("cpu", "tf32"), "engine.precision=tf32 is unknown. Choose auto, bf16, fp16, fp32"),
        "float16 on a CPU": (lambda: Engine("cpu", "fp16"), "precision=fp16 is for GPUs, ", "Choose auto, bf16"),
        "one device": (lambda: Engine("cpu", sharding="fsdp"), "engine.sharding=fsdp: ", "Set engine.devices=N, or"),
        "compiled shards": (shard_compiled, "engine.compile=true with engine.sharding=fsdp: leave one of them out"),
        "sharded slots": (
            lambda: shard(segmenter(partial(SlotHead, 24, 1, 3))),
            "engine.sharding=fsdp: the model predicts slots",
        ),
        "sharded 4-bit layers": (lambda: shard(segmenter(), ["a"]), "4-bit and 8-bit layers"),
    }
)


@pytest.mark.parametrize(
    ("has", "faster"),
    [
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({"bf16": True, "architecture": "aarch64"}, False),
    ],
)
def test_auto_chooses_bfloat16_where_it_is_faster(monkeypatch, has, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert Engine("cpu", "auto").half == faster
    assert Engine("cpu", "bf16").half and not Engine("cpu", "fp32").half


def test_a_second_engine_in_one_process_is_a_fresh_one():
    image = torch.rand(2, 4)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        engine = Engine("cpu", precision)
        with engine.autocast():
            assert nn.Linear(4, 2)(image).dtype == expected


def test_dropout_is_a_function_of_step_and_rank(monkeypatch):
    engine = Engine("cpu")
    dropout = nn.Dropout(0.5)

    def draw(step):
        engine.seed(3, step)
        return dropout(torch.ones(100))

    first = [draw(step) for step in range(8)]
    assert all(torch.equal(draw(step), first[step]) for step in (5, 0))
    monkeypatch.setattr(Engine, "rank", 1)
    assert len({tuple(values.tolist()) for values in [*first, draw(0)]}) == 9


@pytest.mark.parametrize("scale", [None, LossScale()], ids=["float32", "float16"])
def test_clipping_and_the_norm_before_it(scale):
    """With a loss scale, gradients are clipped once they are unscaled."""
    engine = Engine("cpu")
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    if scale is not None:
        scale.begin(2.0, engine.device)
    engine.backward(model(torch.tensor([[3.0, 4.0]])).sum(), scale)
    factor = 1 if scale is None else 2**15
    assert model.weight.grad.tolist() == [[3.0 * factor, 4.0 * factor]]
    loss, norm = engine.optimizer_step(optimizer, torch.tensor(3.0), torch.tensor(2.0), clip=1.0, loss_scale=scale)
    assert (loss.item(), norm.item()) == pytest.approx((1.5, 2.5))
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)
    assert model.weight.grad is None


def test_a_non_finite_gradient_changes_nothing():
    engine = Engine("cpu")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    engine.backward(model(torch.full((1, 1), float("inf"))).sum())
    assert not engine.optimizer_step(optimizer, torch.ones(()), torch.ones(()), clip=1.0)[1].isfinite()
    assert torch.equal(model.weight, before)


def test_images_of_one_size_are_scored_at_once_by_their_size():
    assert Engine("cpu", "fp32").images_at_once((64, 64)) == Engine("cpu", "fp32").images_at_once() == 1
    assert Engine("cpu", "fp32", eval_batch_size=3).images_at_once((64, 64)) == 3
    engine = pretended_engine(eval_batch_size="auto")
    found = [engine.images_at_once(size) for size in ((1, 1), (512, 512), (1080, 1920), (1081, 1941), (9000, 9000))]
    assert found == [16, 8, 1, 1, 1] and engine.images_at_once() == 4


def test_only_rank_0_runs_a_shared_decision():
    ranks = [SimpleNamespace(is_main=main, broadcast=lambda found: found or "shared") for main in (True, False)]
    assert Engine.run_on_rank0(ranks[0], lambda: "found") == "found"
    assert Engine.run_on_rank0(ranks[1], lambda: pytest.fail("it is looked at twice")) == "shared"
