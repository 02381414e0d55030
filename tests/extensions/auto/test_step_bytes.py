"""A step's bytes and operations are those of a real training, and sums that can be done by hand; trials time it."""

from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from itertools import count, repeat
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command_line import SMALL
from mistakes import assert_refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.config.nodes import instantiate
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto import bench_mode as bench
from dinoseg.extensions.auto import trial
from dinoseg.extensions.auto.bench_mode import matrix_peak
from dinoseg.extensions.auto.fake_tensors import fake_tensor_mode
from dinoseg.extensions.auto.random_batch import random_batch
from dinoseg.extensions.auto.step_bytes import LossBytes, cuda_operations, outline, step_bytes, step_flops
from dinoseg.extensions.auto.timing import _later_median
from dinoseg.extensions.auto.training_parts import training_parts
from dinoseg.extensions.auto.trial import try_steps
from dinoseg.extensions.query_heads.mask2former import pixel_decoder, predictor
from dinoseg.inference.memory import PeakBytes
from dinoseg.models.model import trained_names

BASE = [*SMALL, "engine.precision=fp32", "data.classes=[a,b,c]", "data.batch_size=3", "resolution.crop=[64,48]"]
TINY = [*SMALL, "engine.precision=fp32", "resolution.crop=[16,16]"]
TWO_CLASSES = ["data.classes=[dark,bright]"]
FOUR = [*BASE, "adapter=frozen", "backbone.arch.num_hidden_layers=4"]
MASKS = ["head=mask2former", "head.num_heads=1", "head.num_queries=5"]
QUERIES = ["adapter=full", "head=eomt", "head.num_queries=4", "head.blocks=1", "head.layers=[-1]"]
SLOTS = [
    *("hparam=dinosavi_control", "data=movi", *SMALL[4:9], "adapter=frozen", "resolution.crop=[64,64]"),
    *("engine=cpu", "engine.precision=fp32"),
    *("head.slot_dim=16", "head.hidden_dim=16", "head.decoder_dim=16", "data.batch_size=2", "data.clips.cut.length=3"),
]


def parts_of(cfg):
    return training_parts(Builder(cfg))


def loss_of(cfg):
    return LossBytes(parts_of(cfg), bf16=False, accelerator=False)


# of a head with one output: it takes no memory
NO_LOSS = SimpleNamespace(accelerator=False, learns=[0], of=lambda samples: 0)


def foretold(cfg, loss=None, **given):
    given = {"samples": cfg.data.batch_size, "accumulate": cfg.trainer.accumulate, "bf16": False, **given}
    return step_bytes(parts_of(cfg), loss or loss_of(cfg), **given)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "words",
    [
        [*BASE, "adapter=full", "backbone.checkpointing=true", "loss=lovasz", "trainer.ema=0.9"],
        [*BASE, "adapter=lora", "adapter.rank=2", "head=cnn", "head.channels=16", "trainer.accumulate=3"],
        [*FOUR, *MASKS, "loss=mask_classification"],
        [*BASE, *QUERIES, "loss=cross_entropy"],
        SLOTS,
    ],
    ids=["checkpointing", "accumulate", "masks", "mixture", "clips"],
)
def test_the_peak_is_that_of_a_real_training(compose, monkeypatch, words):
    monkeypatch.setattr(predictor, "LAYERS", predictor.LEVELS)  # of nine alike
    monkeypatch.setattr(pixel_decoder, "LAYERS", 2)  # of six
    cfg = compose(*words)
    step = foretold(cfg)
    engine = instantiate(cfg.engine)
    with PeakBytes() as peak:
        parts = parts_of(cfg)
        try_steps(parts, engine, repeat(random_batch(parts, parts.batch_size)), steps=2)
    assert step.peak == pytest.approx(peak.most, rel=0.06)


def test_step_bytes_equal_memory_of_the_model_and_its_graph(compose):
    """By hooks on what autograd keeps, which know nothing of how storages are counted."""
    cfg = compose(*BASE, "adapter=lora", "adapter.rank=2", "adapter.dropout=0.0", "head=mlp", "trainer.ema=0.9")
    step = foretold(cfg, NO_LOSS, world_size=2)
    model = Builder(cfg).model(untrained=True).train()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    own = {t.untyped_storage().data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert step.weights == sum(own.values())
    assert (step.gradients, step.optimizer, step.ranks) == (trained, 2 * trained, trained)
    assert step.average == sum(t.nbytes for t in model.state_dict().values())  # a random backbone is held whole
    cfg.backbone.weights = "given"
    names = trained_names(outline(parts_of(cfg))[0])
    assert not [name for name in names if name.startswith("backbone.") and "lora" not in name]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = model(random_batch(parts_of(cfg), 3).image)
    keep(prediction.outputs)
    by_hand = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    assert step.activations == pytest.approx(by_hand, rel=0.02)


@pytest.mark.heavy
def test_memory_follows_batch_and_precision(compose):
    cfg = compose(*BASE, "adapter=full")
    loss = loss_of(cfg)  # the outputs, of which it is, are those of each
    one, four = foretold(cfg, loss, samples=1), foretold(cfg, loss, samples=4)
    assert four.weights == one.weights and 3.8 < four.activations / one.activations < 4.05
    half = foretold(cfg, loss, samples=4, bf16=True)
    assert 0.5 < half.activations / four.activations < 0.9


def test_quantised_weights_take_their_bits(compose):
    words = [*BASE, "adapter=lora", "adapter.rank=2"]
    cfg, quantised = compose(*words), compose(*words, "adapter.bits=4")
    whole, four = foretold(cfg, NO_LOSS), foretold(quantised, NO_LOSS)
    linear = 2 * (4 * 24 * 24 + 2 * 24 * 48)  # of two blocks
    assert whole.weights - four.weights == pytest.approx((4 - 0.516) * linear, abs=8)
    assert four.optimizer == whole.optimizer


def test_larger_tiles_of_an_accelerator_are_counted(compose, monkeypatch):
    cfg = compose(*BASE, "adapter=frozen")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    here, there = (LossBytes(parts_of(cfg), bf16=False, accelerator=there) for there in (False, True))
    assert there.of(1) - here.of(1) == 4 * 4 * 3 * 64 * 48
    assert threads == 4 * [1, torch.get_num_threads()]  # of two losses each, and given back


def saved_dtypes(operation, device, mode):
    """Return the dtypes of what an operation saves of a fake float32 and bfloat16 input under autocast."""
    saved = []
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)  # `torch.autocast` refuses a CUDA that is not there
    try:
        with FakeTensorMode(), mode, torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
            for dtype in (torch.float32, torch.bfloat16):
                operation(torch.empty(2, 4, 8, device=device, dtype=dtype, requires_grad=True))
    finally:
        torch.set_autocast_enabled(device, before)
    return [tensor.dtype for tensor in saved if tensor.shape == (2, 4, 8)]


@pytest.mark.parametrize(
    "operation",
    [lambda x: F.dropout(x, 0.1), lambda x: F.layer_norm(x, (8,)), lambda x: F.group_norm(x, 2)],
    ids=["dropout", "layer_norm", "group_norm"],
)
def test_operations_save_the_dtypes_of_cuda(operation):
    on_cuda = saved_dtypes(operation, "cuda", nullcontext())
    assert on_cuda and saved_dtypes(operation, "cpu", cuda_operations()) == on_cuda
    assert saved_dtypes(operation, "cpu", nullcontext()) != on_cuda


@pytest.mark.heavy
def test_dropout_of_lora_saves_a_byte_per_value_on_cuda(compose):
    words = [*BASE, "adapter=lora", "adapter.targets=all_linear"]
    parts = parts_of(compose(*words))
    here, there = (LossBytes(parts, bf16=False, accelerator=accelerator) for accelerator in (False, True))
    steps = [step_bytes(parts, loss, samples=3, accumulate=1, bf16=False) for loss in (here, there)]
    model = Builder(compose(*words)).model(untrained=True).train()
    dropped = 0

    def count(module, args):
        nonlocal dropped
        dropped += args[0].numel() if args[0].requires_grad else 0  # no mask is saved of the first inputs

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.register_forward_pre_hook(count)
    model(random_batch(parts, 3).image)
    assert dropped and steps[0].activations - steps[1].activations == 3 * dropped


def test_checkpointing_repeats_the_operations_of_cuda(compose):
    words = [*BASE, "adapter=lora", "backbone.checkpointing=true"]
    parts = parts_of(compose(*words))
    loss = LossBytes(parts, bf16=True, accelerator=True)
    dropout = F.dropout
    sizes = {"samples": 2, "accumulate": 1, "bf16": True}
    again = step_bytes(parts, loss, **sizes)
    assert F.dropout is dropout
    whole = step_bytes(parts_of(compose(*BASE, "adapter=lora")), loss, **sizes)
    assert 0 < again.activations < 0.7 * whole.activations


def test_walking_leaves_no_meta_tensors_behind(compose):
    """Transformers keeps the positions of DINOv3 by their size: those without numbers would be used in training."""
    cfg = compose(*BASE, "adapter=frozen")
    foretold(cfg)
    model = Builder(cfg).model(untrained=True)
    assert torch.isfinite(model(random_batch(parts_of(cfg), 1).image).scores()).all()


def test_only_caches_filled_while_walking_are_cleared(tmp_path, monkeypatch):
    for name in ("keeping", "elsewhere"):
        text = "import functools\n\n\n@functools.cache\ndef kept():\n    return object()\n"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with fake_tensor_mode():
        pass
    elsewhere = import_module("elsewhere")
    before = elsewhere.kept()
    with fake_tensor_mode():
        keeping = import_module("keeping")
        keeping.kept()
        assert elsewhere.kept() is before
    assert keeping.kept.cache_info().currsize == 0 and elsewhere.kept() is before


def test_random_batches_have_the_sizes_and_classes_of_the_recipe(compose):
    parts = training_parts(Builder(compose(*BASE, "resolution.crop=[33,7]")))
    batch = random_batch(parts, 5)
    assert batch.image.shape == (5, 3, 33, 7) and batch.mask.shape == (5, 33, 7) and len(batch.names) == 5
    assert batch.image.dtype == batch.mask.dtype == torch.uint8 and set(batch.mask.unique().tolist()) <= {0, 1, 2}
    assert torch.equal(random_batch(parts, 5).image, batch.image) and batch.image.float().std() > 60
    clips = random_batch(parts_of(compose(*SLOTS)), 2)
    assert clips.image.shape == (2, 3, 3, 64, 64) and len(clips.names) == 2 and not clips.mask.numel()


def test_clips_as_long_as_their_videos_have_no_size(compose):
    endless = compose(*SLOTS, "data.clips.cut.length=null")
    assert_refused(lambda: parts_of(endless), "data.clips.cut.length=None: the number of frames")
    images = compose("data=camvid", "data.root=x", "loss=feature_reconstruction")
    assert_refused(lambda: parts_of(images), "data.clips.cut.length=None: the number of frames")


def test_step_flops_equal_a_count_by_hand(compose):
    """Two blocks of width 24 and hidden width 48 on 8 x 6 cells and five tokens beside them."""
    cells, width, hidden, samples = 48, 24, 48, 3
    tokens = cells + 5
    block = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 2 * 2 * tokens**2 * width
    patches, head = 2 * cells * 3 * 8 * 8 * width, 2 * cells * width * 2
    last = (*BASE, *TWO_CLASSES, "head.layers=[-1]")
    frozen = step_flops(parts_of(compose(*last, "adapter=frozen")), samples, bf16=False)
    forward = samples * (patches + 2 * block + head)
    assert frozen == pytest.approx(forward + 2 * samples * head, rel=0.02)
    whole = step_flops(parts_of(compose(*last, "adapter=full")), 2 * samples, bf16=False)
    assert whole == pytest.approx(2 * 3 * forward, rel=0.1)  # attention goes backward in five products for two


@pytest.mark.heavy
def test_step_flops_equal_a_count_over_a_real_step(compose):
    words = ("adapter=lora", "head=eomt", "head.blocks=1", "loss=mask_classification")
    parts = parts_of(compose(*BASE, *TWO_CLASSES, *words))
    model = parts.model().train()
    batch = random_batch(parts, 2)
    loss = parts.loss()
    with FlopCounterMode(display=False) as forward:
        prediction = model(batch.image)
    value, _ = loss(prediction, batch)
    with FlopCounterMode(display=False) as backward:
        value.backward()
    assert step_flops(parts, 2, bf16=False) == forward.get_total_flops() + backward.get_total_flops() > 1_000_000


def test_matrix_peak_of_a_device_is_measured(monkeypatch):
    assert 1e8 < matrix_peak(torch.device("cpu"), torch.float32) < 1e15
    monkeypatch.setattr(bench, "_SIDES", {"cpu": 8})
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=count().__next__))  # a second for each product
    assert matrix_peak(torch.device("cpu"), torch.bfloat16) == 2 * 8**3


def test_steps_are_timed_with_their_batches_once_warm(compose, monkeypatch):
    cfg = compose(*TINY, "trainer.accumulate=2", "trainer.save_every=1")
    clock = SimpleNamespace(perf_counter=count().__next__, monotonic=lambda: 0.0)  # each reading takes a second
    monkeypatch.setattr(trial, "time", clock)
    monkeypatch.setattr(trial, "used_memory", lambda device: 30)
    monkeypatch.setattr(trial, "peak_memory", lambda device: 70)
    saved = []
    monkeypatch.setattr(trial.Checkpointer, "save", lambda *_: saved.append(1))
    parts = parts_of(cfg)
    batches = repeat(random_batch(parts, 2))
    found = try_steps(parts, instantiate(cfg.engine), batches, steps=2, warmup=1)
    assert (found.seconds, found.waited) == ([5, 5], [2, 2]) and (found.before, found.peak) == (30, 40)
    assert len(saved) == 1  # the end is that of a training that is stopped


def test_trial_runs_for_at_least_the_given_seconds(compose, monkeypatch):
    cfg = compose(*TINY)
    clock = SimpleNamespace(perf_counter=count().__next__, monotonic=lambda: 0.0)  # a step takes 3 s
    monkeypatch.setattr(trial, "time", clock)
    monkeypatch.setattr(trial, "_MAX", 8)
    parts = parts_of(cfg)
    for lasting, timed in ((0, 2), (6, 2), (7, 3), (12, 4), (1e9, 7)):  # beside the one that warms up
        batches = repeat(random_batch(parts, 2))
        found = try_steps(parts, instantiate(cfg.engine), batches, steps=2, warmup=1, lasting=lasting)
        assert (len(found.seconds), len(found.waited)) == (timed, timed), lasting


def test_step_time_is_the_median_of_the_later_half():
    assert _later_median([9.0]) == 9 and _later_median([9.0, 2.0]) == 2 and _later_median([9.0, 3.0, 1.0]) == 2
    assert _later_median([9.0, 9.0, 9.0, 1.0, 5.0, 2.0]) == 2


def test_backbone_frozen_at_first_is_timed_as_trained(compose, caplog, monkeypatch):
    cfg = compose(*TINY, "optim.optimizer.freeze_backbone_until=0.9")
    trained = []
    parts = parts_of(cfg)

    def build_model():
        model = parts.model()
        model.backbone.register_forward_hook(
            lambda part, _, maps: trained.append((part.training, maps[0].requires_grad))
        )
        return model

    parts_of_model = replace(parts, model=build_model)
    try_steps(parts_of_model, instantiate(cfg.engine), repeat(random_batch(parts, 2)), steps=2, warmup=1)
    assert trained == [(True, True)] * 3
    assert not caplog.records
