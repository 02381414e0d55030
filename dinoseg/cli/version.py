"""Versions for bug reports, printed by `--version`."""

import platform

import dinoseg


def versions() -> str:
    """Return the versions of dinoseg, torch with its CUDA, and Python, one per line."""
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    seen = f", {torch.cuda.device_count()} GPUs found" if torch.version.cuda else ""
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return f"dinoseg {dinoseg.__version__}\ntorch {torch.__version__} ({cuda}{seen})\n{python}"
