"""A whole training with the recipe of DINOv3's linear probe, against a loop in plain PyTorch on the same views."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from finished_runs import rows, train_run
from making import save
from torch import nn

from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.heads.linear import LinearHead

STEPS, WARMUP = 24, 4
WORDS = [
    *("mode=train", "hparam=linear_ade20k", "data=folder", "data.root=data", "data.classes=[a,b,c]", "seed=3"),
    *("backbone=timm", "backbone.name=test_vit", "backbone.weights=random", "head.dropout=0", "engine=cpu"),
    *("resolution.crop=[64,64]", "inference.size=64", "inference.stride=43", "inference.shortest=64"),
    *(f"trainer.steps={STEPS}", f"optim.schedule.warmup={WARMUP}", f"trainer.val_every={STEPS}", "data.batch_size=4"),
    *("optim.optimizer.weight_decay=0.5", "trainer.log_every=1", "engine.workers=0"),
]


def rate(iteration):
    """DINOv3's one-cycle rate, whose scheduler takes no step after the first iteration."""
    step = max(0, iteration - 1)
    if step < WARMUP:
        return 1e-3 * (1 - (1 - step / WARMUP) * (1 - 1e-6)) * (1 - step / STEPS)
    return 1e-3 * (1 + math.cos(math.pi * (step + 1) / STEPS)) / 2


def test_a_training_of_the_linear_probe_equals_a_loop_in_pytorch(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, number in [("train", each) for each in range(6)] + [("val", each) for each in range(2)]:
        mask = rng.integers(0, 3, (6, 9)).repeat(12, 0).repeat(12, 1).astype(np.uint8)
        image = (60 * mask[..., None] + rng.integers(0, 90, (*mask.shape, 3))).astype(np.uint8)
        mask[:5] = 255
        save(tmp_path / f"data/{split}/images/{number}.png", image)
        save(tmp_path / f"data/{split}/masks/{number}.png", mask)
    heads, features, masks = [], [], []
    forward, loss = LinearHead.forward, CrossEntropy.forward

    def forward_and_record(head, maps):
        if head.training:
            heads.append({name: value.detach().double() for name, value in head.state_dict().items()})
            features.append(torch.cat(maps, 1).detach().double())
        return forward(head, maps)

    def loss_and_record(criterion, prediction, batch):
        masks.append(batch.mask.long())
        return loss(criterion, prediction, batch)

    monkeypatch.setattr(LinearHead, "forward", forward_and_record)
    monkeypatch.setattr(CrossEntropy, "forward", loss_and_record)
    tensors, _ = train_run(tmp_path, "run", *WORDS)

    norm, classify = nn.BatchNorm2d(features[0].shape[1]).double(), nn.Conv2d(features[0].shape[1], 3, 1).double()
    plain = nn.ModuleDict({"norm": norm, "classify": classify})
    plain.load_state_dict(heads[0])
    norm.reset_running_stats()  # the first forward pass has already updated them
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.5)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step)
        logits = F.interpolate(classify(norm(features[step])), (64, 64), mode="bilinear")
        value = F.cross_entropy(logits, masks[step], ignore_index=255, reduction="sum") / masks[step].numel()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    logged = [row["train/loss"] for row in rows(tmp_path, "run") if "train/loss" in row]
    np.testing.assert_allclose(logged, losses, rtol=2e-6)
    for name, value in plain.state_dict().items():
        (found,) = [tensor for key, tensor in tensors.items() if key.endswith(f"head.{name}") and "optim" not in key]
        torch.testing.assert_close(found.double(), value.double(), rtol=1e-4, atol=2e-6)
