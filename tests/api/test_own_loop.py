"""A caller's own loop: the loss curve of mode=train, on several processes, and compiled."""

import pytest
import torch
from command_line import SMALL, TINY_KEYS, write_data
from finished_runs import rows, train_run
from making import train_batches
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import dinoseg
from dinoseg.api.compose import compose
from dinoseg.experiment.builder import Builder

pytestmark = pytest.mark.slow
STEPS = 5
WORDS = (
    *(*SMALL, "engine.precision=fp32", "loss=ce_dice", "head=mlp", f"trainer.steps={STEPS}", "trainer.log_every=1"),
    *(f"trainer.val_every={STEPS}", "optim.schedule.kind=constant", "optim.schedule.warmup=0", "head.lr=1e-3"),
)


def tiny(**overrides):
    parts = {"adapter": "full", "head": "mlp", "classes": ["dark", "bright"]}
    return dinoseg.create_model("tiny", **parts, **TINY_KEYS, **overrides)


def test_a_plain_loop_has_the_loss_curve_of_a_training(tmp_path):
    write_data(tmp_path / "data")
    train_run(tmp_path, "run", "mode=train", "mode.report=false", "mode.metrics_only=true", *WORDS)
    expected = [row["train/loss"] for row in rows(tmp_path, "run") if "train/loss" in row]

    data = dinoseg.open_dataset(root=tmp_path / "data", classes=["dark", "bright"])
    model = tiny(**{"head.lr": 1e-3})
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    augment = Builder(compose([*WORDS, f"data.root={tmp_path}/data"])).part("data.augment")
    batches = train_batches(data, augment, seed=0, batch_size=2)
    losses = []
    for batch, _ in zip(batches, range(STEPS), strict=False):
        logits = model(batch.image)
        loss = dinoseg.losses.cross_entropy_loss(logits, batch.mask) + dinoseg.losses.dice_loss(logits, batch.mask)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == len(expected) == STEPS and losses == pytest.approx(expected, abs=1e-5)
    assert len({*losses}) == STEPS


def joint():
    rng = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 32, 48, generator=rng), torch.randint(0, 2, (4, 32, 48), generator=rng)


def train_rank(rank, store, folder):
    """Save the gradients of one rank for its half of the batch."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(tiny())
        images, targets = (part[2 * rank :][:2] for part in joint())
        dinoseg.losses.cross_entropy_loss(model(images), targets).backward()
        torch.save({name: value.grad for name, value in model.module.named_parameters()}, f"{folder}/{rank}.pt")
        model.module.save(f"{folder}/{rank}.safetensors")
    finally:
        distributed.destroy_process_group()


@pytest.mark.heavy
def test_gradients_of_two_processes_equal_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(train_rank, (tmp_path / "store", tmp_path), nprocs=2)
    model = tiny()
    images, targets = joint()
    dinoseg.losses.cross_entropy_loss(model(images), targets).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in model.named_parameters():
            assert (found[name] is None) == (value.grad is None), name
            if value.grad is not None:
                assert torch.allclose(found[name], value.grad, rtol=1e-4, atol=1e-7), name
    assert dinoseg.load(tmp_path / "0.safetensors", device="cpu").classes == ("dark", "bright")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which torch reads itself while it compiles
@pytest.mark.parametrize("adapter", ["frozen", "lora"])
def test_a_compiled_model_has_the_same_logits_and_gradients(adapter):
    options = {"adapter.dropout": 0.0} if adapter == "lora" else {}
    model = dinoseg.create_model("tiny", adapter=adapter, head="mlp", num_classes=2, **TINY_KEYS, **options)
    images, targets = joint()
    gradients = []
    for each in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        logits = each(images)
        dinoseg.losses.cross_entropy_loss(logits, targets).backward()
        gradients.append([value.grad.clone() for value in model.parameters() if value.requires_grad])
        gradients[-1].append(logits.detach())
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))
