"""Precision of computation: the dtype to use on a device, and casts out of half precision."""

import torch
from torch import Tensor

from dinoseg.utils.errors import UserError

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TENSOR_CORES = 7, 0  # compute capability from which float16 has them


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a precision (auto, bf16, fp16 or fp32) on `device`.

    `auto` is bfloat16 where that is faster than float32, float16 on other CUDA devices with tensor cores (V100, T4),
    else float32.

    Raises:
        UserError: if the precision is unknown, or fp16 on a CPU.
    """
    if precision not in ("auto", *NAMES.values()):
        raise UserError(f"engine.precision={precision} is unknown. Choose auto, {', '.join(NAMES.values())}.")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("engine.precision=fp16 is for GPUs, and this device is the CPU. Choose auto, bf16 or fp32.")
    if precision != "auto":
        return next(dtype for dtype, name in NAMES.items() if name == precision)
    if bfloat16_is_faster(device):
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.get_device_capability() >= _TENSOR_CORES:
        return torch.float16
    return torch.float32


def bfloat16_is_faster(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 natively and faster than float32, so that autocast pays off.

    Among CPUs, those with AMX do, and AMD's with AVX-512 bfloat16. Intel CPUs that have only the latter, as where a
    virtual machine hides AMX, take 1.5 to 1.8 times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and "Intel" not in str(has.get("cpu_name"))))
    return False


def has_tf32(device: torch.device) -> bool:
    """Return whether `device` supports TF32 for float32 products: CUDA devices from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def at_least_float32(values: Tensor) -> Tensor:
    """Cast half-precision tensors to float32, and return others unchanged."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
