"""From a composed config to a running mode: the checkpoint it goes on from, its folder, its ranks, its log."""

import logging
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config import plain, register_resolvers
from dinoseg.errors import UserError

LOG = "run.log"
LAUNCH_KEYS = ("devices", "resume_from")  # keys of a mode that are read here; the rest are its function's


def launch(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> Any:
    """Run the chosen mode and return what it returns: on one device here, else in ranks started from here.

    A mode with `resume_from: last` goes on in the checkpoint's own run folder, one with `best` works in a new one.
    A mode with `devices` above 1 runs in so many ranks; where torchrun has started them (WORLD_SIZE is set), this
    process is one of them.
    """
    out_dir, fresh = claim(out_dir), out_dir
    if cfg.resume is not None and "resume_from" in cfg.mode:
        cfg, out_dir = _resumed(cfg, out_dir, overrides)
        if out_dir != fresh:
            _hand_over(fresh, out_dir)
    devices = cfg.mode.get("devices", 1)
    if devices < 1:
        raise UserError(f"engine.devices={devices}: give a number of at least 1.")
    if devices == 1 or "WORLD_SIZE" in os.environ:
        return run_mode(cfg, out_dir)
    return _spawn(cfg, out_dir, devices)


def run_mode(cfg: DictConfig, out_dir: Path) -> Any:
    """Call the mode's function in this process."""
    configure_log(out_dir, main=os.environ.get("RANK", "0") == "0")
    from dinoseg.build import instantiate

    node = {key: value for key, value in plain(cfg.mode, resolve=True).items() if key not in LAUNCH_KEYS}
    return instantiate(OmegaConf.create(node))(cfg, out_dir=out_dir)


def claim(out_dir: Path) -> Path:
    """Make a run folder this process's own; one that another run has claimed is left alone, and `_2`, ... taken."""
    for number in range(1, 1000):
        folder = out_dir if number == 1 else out_dir.with_name(f"{out_dir.name}_{number}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / LOG).touch(exist_ok=False)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"{out_dir} and 998 folders beside it are taken. Remove old runs.")


def configure_log(out_dir: Path, main: bool) -> None:
    """Send the log to the terminal and the run folder's `run.log`; ranks other than the first only warn."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if main:
        handlers.append(logging.FileHandler(out_dir / LOG))
    logging.basicConfig(
        level=logging.INFO if main else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    for noisy in ("httpx", "accelerate", "transformers", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _resumed(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
    from dinoseg import resume
    from dinoseg.training import checkpoint

    prefer = cfg.mode.resume_from
    path = resume.locate(cfg, out_dir, prefer)
    if path is None:
        print(
            "resume=auto: no earlier run of this recipe has a checkpoint, so this is a new one.",
            file=sys.stderr,
        )
        return resume.without(cfg), out_dir
    merged = resume.merge(cfg, overrides, checkpoint.read(path))
    return merged, path.parent.parent if prefer == "last" else out_dir


def _hand_over(fresh: Path, run: Path) -> None:
    """Move the composed config of a continuation into the run that goes on, and drop its own empty folder."""
    number = len(list(run.glob("config*"))) + 1
    if (fresh / "config").is_dir():
        shutil.move(fresh / "config", run / f"config_{number}")
    shutil.rmtree(fresh)


def _spawn(cfg: DictConfig, out_dir: Path, devices: int) -> None:
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        arguments = (devices, port, plain(cfg), out_dir)
        start_processes(_run_rank, arguments, devices, start_method="spawn")
    except ProcessExitedException as error:
        raise UserError(
            f"Rank {error.error_index} ended with status {error.exit_code}: see its message above."
        ) from None


def _run_rank(rank: int, world: int, port: int, cfg: dict, out_dir: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    register_resolvers()
    try:
        run_mode(OmegaConf.create(cfg), out_dir)
    except UserError as error:
        print(f"error (rank {rank}): {error}", file=sys.stderr)
        sys.exit(1)
