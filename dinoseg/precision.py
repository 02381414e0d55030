"""Half precision: where it pays, and where it is too coarse."""

import torch
from torch import Tensor


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether a precision (auto, bf16 or fp32) is bfloat16 on `device`."""
    return precision == "bf16" or (precision == "auto" and bfloat16_is_faster(device))


def bfloat16_is_faster(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 natively and faster than float32, so that autocast to it pays.

    Of processors, those with AMX do, and AMD's with AVX-512's bfloat16. Intel's that have this alone, as where a
    virtual machine hides AMX, take 1.5 to 1.8 times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and "Intel" not in str(has.get("cpu_name"))))
    return False


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32, and all else as it is."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
