import logging
from unittest.mock import MagicMock, Mock

import pytest
import torch
from mistakes import assert_refused
from small_trainings import segmenter
from tiny_parts import tiny_vit

from dinoseg.models.adapters import Frozen, Lora
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.training import compiled
from dinoseg.training.compiled import compile_blocks
from dinoseg.training.engine import Engine


@pytest.fixture
def shapes(monkeypatch):
    """Note the shapes that compiled code is given, which is none here."""
    noted = []

    def stand_in(plain, *, dynamic):
        assert dynamic is False
        return lambda tokens, **beside: (noted.append(tuple(tokens.shape)), plain(tokens, **beside))[1]

    monkeypatch.setattr(compiled.torch, "compile", stand_in)
    return noted


def test_blocks_are_compiled_for_the_first_repeated_size(shapes):
    backbone = tiny_vit().eval()
    names = set(backbone.state_dict())
    blocks = len(backbone.blocks)
    sizes = [(16, 16), (32, 24), (32, 24), (16, 16), (16, 16), (32, 24)]
    images = [torch.rand(2, 3, *size) for size in sizes]
    with torch.no_grad():
        plain = [backbone(each) for each in images]
        compile_blocks(backbone)
        ours = [backbone(each) for each in images]
    assert len(shapes) == 2 * blocks and len(set(shapes)) == 1
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    backbone(images[1])  # with gradients
    assert len(shapes) == 2 * blocks
    assert set(backbone.state_dict()) == names


def test_compiled_block_serves_one_dtype_and_mask_and_no_export(shapes, monkeypatch):
    once = compiled._Once(lambda tokens, **_: tokens, compiled._State())
    tokens = torch.zeros(1, 2, 3)
    for _ in range(3):
        once(tokens, attention_mask=None)
    assert len(shapes) == 2
    once(tokens.double(), attention_mask=None)
    once(tokens, attention_mask=torch.zeros(1))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    once(tokens, attention_mask=None)
    assert len(shapes) == 2


def test_checkpointing_repeats_a_block_as_it_ran(shapes):
    backbone = TimmBackbone("test_vit", "random", None, checkpointing=True).train()
    compile_blocks(backbone)
    compiled_calls = []
    for _ in range(2):
        backbone(torch.rand(1, 3, 32, 48))[0].sum().backward()
        compiled_calls.append(len(shapes))
    assert compiled_calls == [0, 2 * len(backbone.blocks)]


def test_last_block_is_not_compiled_for_its_attention(shapes):
    backbone = TimmBackbone("test_vit", "random", None).eval()
    image = torch.rand(1, 3, 32, 48)
    plain = backbone.with_class_attention(image)
    compile_blocks(backbone)
    backbone(image)
    for ran in (backbone.with_class_attention, backbone, backbone.with_class_attention):
        shapes.clear()
        found = ran(image)
        assert len(shapes) == len(backbone.blocks) - (ran is not backbone)
    torch.testing.assert_close(found, plain)


def test_failing_compilation_falls_back_with_one_warning(monkeypatch, caplog):
    def run(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a long story")

    monkeypatch.setattr(compiled.torch, "compile", lambda plain, **_: run)
    backbone = tiny_vit().eval()
    image = torch.rand(1, 3, 32, 24)
    plain = backbone(image)
    compile_blocks(backbone)
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(*each) for _ in range(3) for each in zip(plain, backbone(image), strict=True))
    said = "engine.compile=true: torch cannot compile here (no compiler); continuing without compilation."
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_pyramid_is_not_compiled():
    backbone = tiny_vit()
    backbone.is_pyramid = True
    assert_refused(lambda: compile_blocks(backbone), "Leave it out for a pyramid")


@pytest.mark.parametrize("wanted", [False, True])
def test_engine_compiles_blocks_of_placed_models_if_configured(shapes, wanted):
    model = segmenter(adapter=Frozen).eval()
    placed = Engine("cpu", "fp32", compile=wanted).place(model)
    for _ in range(2):
        placed(torch.rand(1, 3, 32, 24))
    assert len(shapes) == wanted * len(model.backbone.blocks)


@pytest.mark.heavy
def test_compiled_blocks_give_the_same_maps_and_gradients():
    backbone = Lora(2, 4)(tiny_vit())
    image = torch.rand(1, 3, 32, 24)

    def step():
        value = sum(part.square().mean() for part in backbone(image))
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, parameters)]

    plain = step()
    compile_blocks(backbone)
    step()
    torch.testing.assert_close(step(), plain, rtol=1e-4, atol=1e-6)


@pytest.fixture
def cuda(shapes, monkeypatch):
    """Let all tensors seem to be on CUDA, and return the mock of its streams and graphs."""
    mock = MagicMock()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(mock, name))
        getattr(mock, name).return_value.__exit__.return_value = False
    return mock


def test_failed_capture_of_a_graph_continues_without_it(cuda, caplog):
    cuda.CUDAGraph.side_effect = RuntimeError("operation not permitted")
    backbone = tiny_vit().eval()
    image = torch.rand(1, 3, 32, 24)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        plain = backbone(image)
        compile_blocks(backbone)
        assert all(torch.equal(*each) for _ in range(6) for each in zip(plain, backbone(image), strict=True))
    assert cuda.CUDAGraph.call_count == 1
    assert [record.getMessage() for record in caplog.records] == [
        "engine.compile=true: no CUDA graph (operation not permitted); continuing without it."
    ]


def test_interrupted_capture_of_a_graph_leaves_none(cuda):
    backbone = tiny_vit().eval()
    image = torch.rand(1, 3, 32, 24)
    passes = [[image]] * 3 + [None, InterruptedError]  # before the capture; for its workspaces; the captured one
    backbone.forward = Mock(side_effect=[*passes, None, [image]])
    compile_blocks(backbone)
    with torch.no_grad():
        for _ in range(3):
            backbone(image)
        with pytest.raises(InterruptedError):
            backbone(image)
        backbone(image)  # captures another graph, for the first has nothing to replay
    assert cuda.CUDAGraph.call_count == 2 and cuda.CUDAGraph.return_value.replay.call_count == 1
