"""Section of a report about its run: command line, versions, device and config."""

import os
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dinoseg import __version__
from dinoseg.runs.folder import command_lines

EVALUATION = "evaluation"  # in a run folder of mode=train: evaluation of its best checkpoint
TRACKING = "tracking.json"  # in a run folder of mode=eval on videos: settings that its masks depend on
_LIBRARIES = ("torch", "transformers", "timm", "numpy", "omegaconf")


def about_run(
    folder: Path, config: str, facts: Mapping[str, str], device: torch.device | None = None
) -> dict[str, Any]:
    """Return the command lines of a run as `command`, the `facts` on versions and machine, and its `config`.

    Args:
        folder: run folder, which stores the command that started the run and those that resumed it.
        config: the whole config as YAML.
        facts: entries from the mode itself, by name.
        device: compute device; None leaves it out.
    """
    command = "\n".join(f"python -m dinoseg {shlex.join(words)}" for words in command_lines(folder))
    machine = {
        "dinoseg": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
    }
    if device is not None:
        machine["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"command": command, "facts": {**facts, **machine}, "config": config}
