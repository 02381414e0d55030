"""What is done on CUDA, done there: numbers beside a CPU's, waits as torch counts them, quantised blocks, memory."""

import warnings
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import INFO
from test_cuda_matrix import ADAPTERS, BACKBONES, QUANTISED, WAITS, cell, losses
from test_cuda_paths import Noise, Rows, Watched, tiny
from test_matrix import HEADS, SMALL_HEADS

from dinoseg.config.plain import to_container
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto.fitting import FitSearch
from dinoseg.extensions.auto.random_batch import random_batch
from dinoseg.extensions.auto.separate_process import run_in_process
from dinoseg.extensions.auto.target import Target, memory_of
from dinoseg.extensions.auto.training_parts import training_parts
from dinoseg.extensions.auto.trial import try_steps
from dinoseg.training.checkpoint import Checkpointer, read
from dinoseg.training.engine import Engine
from dinoseg.training.optim import adamw, schedule
from dinoseg.training.trainer import Settings, TrainingSetup, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),  # torch gives it once per process
]


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Multiply without TF32, whose 10 bits are not a CPU's 23, and count waits where a test asks for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.cuda.set_sync_debug_mode("default")


class Waits:
    """How often CUDA was waited for since the last time, as torch warns of it."""

    def __init__(self, caught):
        self.caught = caught

    def take(self):
        found = [str(each.message) for each in self.caught]
        self.caught.clear()
        return sum("synchroniz" in message for message in found)


def train(
    folder, model, loss, device="cuda", precision="fp32", start=None, watch=False, compile=False, adam=False, **options
):
    """Train, by plain descent unless it is to go on: rounding turns no step; return rows, what moved and feed."""
    engine = Engine(device, precision, workers=0, compile=compile)
    model = engine.place(model)
    loss = loss.to(engine.device)
    log = Rows()
    data_module = Watched(Noise(4), Noise(2), lambda image, mask, _: (image, mask), 2, seed=0, workers=0)
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    before = {name: part.detach().cpu().clone() for name, part in trained.items()}
    optimizer = adamw(model, lr=1e-3)
    optimizer = optimizer if adam else torch.optim.SGD(optimizer.param_groups, fused=device == "cuda")
    checkpoints = Checkpointer(folder, dict(INFO), start)
    settings = Settings(**{"steps": 3, "val_every": 3, "log_every": 1, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data_module.begin(Waits(caught))
        torch.cuda.set_sync_debug_mode("warn" if watch else "default")
        shape = schedule("constant")
        fit(TrainingSetup(model, loss, data_module, optimizer, shape, engine, checkpoints, log, settings))
        torch.cuda.set_sync_debug_mode("default")
    moved = torch.cat([(part.detach().cpu() - before[name]).flatten().double() for name, part in trained.items()])
    return SimpleNamespace(rows=log.rows, moved=moved, data_module=data_module)


def values(done, key):
    return [row[key] for row in done.rows if key in row]


def agree(there, here, close=1e-3, turned=0.05):
    """Hold losses and scores, and what weights moved by: three steps change a loss by less than it may be off."""
    for key in ("train/loss", "val/loss", "val/miou"):
        assert len(values(here, key)) > 0
        assert values(there, key) == pytest.approx(values(here, key), rel=close, abs=close), key
    assert 0 < here.moved.norm() < torch.inf and there.moved.norm() > 0
    assert (there.moved - here.moved).norm() <= turned * here.moved.norm()


def loss_of(head):
    return "mask_classification" if "num_queries" in SMALL_HEADS.get(head, {}) else "cross_entropy"


CELLS = {  # parts, and how far losses and movements of weights may be from a CPU's
    **{head: ({"head": head, "loss": loss_of(head)}, 1e-3, 0.05) for head in HEADS},
    # points are drawn on the device, by a generator of its own
    **{head: ({"head": head, "loss": loss_of(head)}, 0.2, 1.0) for head in HEADS if "mask" in loss_of(head)},
    **{loss: ({"loss": loss}, 1e-3, 0.05) for loss in losses() if loss != "mask_classification"},
    **{adapter: ({"adapter": adapter}, 1e-3, 0.05) for adapter in ADAPTERS},
    # of ConvNeXt a CPU's own ways are 0.14 apart
    **{backbone: ({"adapter": "full", "backbone": backbone}, 5e-3, 0.5) for backbone in BACKBONES},
    # with kernels of their own, which round otherwise
    **{adapter: ({"adapter": adapter}, 0.05, 0.3) for adapter in QUANTISED},
}


@pytest.mark.parametrize(("given", "close", "turned"), CELLS.values(), ids=CELLS)
def test_each_part_trains_as_on_a_cpu(tmp_path, given, close, turned):
    """Without what each device draws by itself."""
    done = {}
    for device in ("cuda", "cpu"):
        model, loss = cell(**given)
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout | torch.nn.Dropout2d):
                part.p = 0.0
            if hasattr(part, "jitter"):
                part.jitter = 0.0
        done[device] = train(tmp_path / device, model, loss, device=device)
    agree(done["cuda"], done["cpu"], close, turned)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", HEADS)
def test_step_synchronises_only_where_expected(tmp_path, head, precision):
    loss = loss_of(head)
    done = train(tmp_path, *cell(head, loss=loss), precision=precision, watch=True, steps=4, val_every=4, log_every=4)
    waits = sum(WAITS.get(loss, {}).values())
    assert done.data_module.steps[1:3] == [waits, waits]  # the first one is that of kernels that are made


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
def test_compiled_blocks_train_the_same(tmp_path, caplog):
    plain, compiled = (train(tmp_path / str(way), *cell(adapter="full"), compile=way) for way in (False, True))
    agree(compiled, plain)
    assert "torch cannot compile here" not in caplog.text


def test_cuda_graphs_follow_images_weights_and_sizes():
    model = Engine("cuda", "bf16", workers=0, compile=True).place(cell(adapter="full")[0]).eval()
    plain = Engine("cuda", "bf16", workers=0).place(cell(adapter="full")[0]).eval()
    plain.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)

    def compare(size, change=None):
        for _ in range(6):  # three passes precede the capture
            images = torch.rand(2, 3, *size, generator=generator).cuda()
            if change is not None:
                for each in (model, plain):
                    change(each.backbone)
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                found, expected = (each(images).logits() for each in (model, plain))
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)

    def scale_in_place(backbone):
        with torch.no_grad():
            next(iter(backbone.blocks.parameters())).mul_(1.5)

    def replace_storage(backbone):
        for parameter in backbone.blocks.parameters():
            parameter.data = parameter.data * 0.9

    compare((64, 96))
    compare((64, 96), scale_in_place)
    compare((64, 96), replace_storage)
    compare((48, 48))
    assert vars(model.backbone)["forward"]._graph is not None


@pytest.mark.parametrize(("first", "then"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_training_resumes_from_its_checkpoint(tmp_path, first, then):
    whole = train(tmp_path / "whole", *tiny(), adam=True, steps=4, val_every=2)
    train(tmp_path / "cut", *tiny(), device=first, adam=True, steps=2, val_every=2)
    start = read(tmp_path / "cut" / "last.safetensors")
    rest = train(tmp_path / "cut", *tiny(), device=then, adam=True, start=start, steps=4, val_every=2)
    assert values(rest, "train/loss") == pytest.approx(values(whole, "train/loss")[2:], rel=1e-3)


def measure_step(values):
    """Run two real steps of a plain config on noise."""
    build = Builder.of(values)
    parts = training_parts(build)
    batches = repeat(random_batch(parts, parts.batch_size))
    return try_steps(parts, build.engine(), batches, steps=2)


@pytest.mark.parametrize("adapter", ["frozen", "lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_step_is_estimated(compose, adapter, checkpointing):
    words = ("backbone=dinov3_vits16", "backbone.weights=random", f"adapter={adapter}", "head=linear")
    words += ("data.root=none", "data.classes=[a,b,c]", "resolution.crop=[256,256]", "data.batch_size=8")
    cfg = compose(*words, f"backbone.checkpointing={str(checkpointing).lower()}", "engine.precision=bf16")
    target = Target("cuda", memory_of("24GiB"), bf16=True)
    foretold = FitSearch(partial(training_parts, Builder(cfg)), target).as_it_is
    taken = run_in_process(measure_step, to_container(cfg)).peak
    assert 0.9 * foretold.step.peak < taken < 1.08 * foretold.step.peak + 128 * 2**20, (foretold.step.peak, taken)
