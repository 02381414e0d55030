"""Floating-point operations: of a training step, counted on a walk without numbers, and of a device at its best."""

import time

import torch
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.autotune.fitting import Change, changed
from dinoseg.autotune.step_bytes import Learnt, LossBytes, ends_of, outline, predict
from dinoseg.inference.walk import walking
from dinoseg.utils.devices import synchronize

_SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices that are multiplied: large enough to be bound by arithmetic
_TIMES = 10


def step_flops(cfg: DictConfig, samples: int, *, bf16: bool) -> int:
    """Return the operations of a model's forward and backward pass over so many samples; a multiply-add is two.

    Matrix products, convolutions and attention count. What checkpointing computes again does not, nor the loss.

    Raises:
        UserError: the parts of the config do not go together.
    """
    parts = [part for part in ("backbone", "head") if cfg[part].get("checkpointing")]
    cfg = changed(cfg, (Change({f"{part}.checkpointing": False for part in parts}, ""),))
    learns = LossBytes(cfg, bf16=bf16, accelerator=False).learns
    model, _ = outline(cfg)
    with walking(), FlopCounterMode(display=False) as counter:
        ends = ends_of(predict(model.to_empty(device="cpu"), cfg, samples, bf16))
        Learnt.apply(*(ends[place] for place in learns)).backward()
    return counter.get_total_flops()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of the fastest of some products of large square matrices on a device."""
    side = _SIDES.get(device.type, 1024)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_TIMES):
        synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
