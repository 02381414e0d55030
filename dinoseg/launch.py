"""From a composed config to a running mode: the checkpoint it goes on from, its folder, its ranks, its log."""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dinoseg.config import plain, register_resolvers
from dinoseg.errors import UserError

LOG = "run.log"
LAUNCH_KEYS = ("devices", "resume_from")  # keys of a mode that are read here; the rest are its function's


def launch(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> Any:
    """Run the chosen mode and return what it returns: on one device here, else in ranks started from here.

    A mode with `resume_from: last` goes on in the checkpoint's own run folder, one with `best` works in a new one.
    A mode with `devices` above 1 runs in so many ranks; where torchrun has started them (WORLD_SIZE is set), this
    process is one of them and works in the first one's folder.
    """
    _check_added(cfg, overrides)
    continued = None
    if cfg.resume is not None and "resume_from" in cfg.mode:
        cfg, continued = _resumed(cfg, out_dir, overrides)
    if continued is not None:
        _drop_empty(out_dir)
        out_dir = continued
    elif is_first_rank():
        out_dir = claim(out_dir)
    if is_first_rank():
        _write_config(cfg, out_dir, overrides)
    devices = cfg.mode.get("devices", 1)
    if devices < 1:
        raise UserError(f"engine.devices={devices}: give a number of at least 1.")
    if devices == 1 or "WORLD_SIZE" in os.environ:
        return run_mode(cfg, out_dir)
    return _spawn(cfg, out_dir, devices)


def run_mode(cfg: DictConfig, out_dir: Path) -> Any:
    """Call the mode's function in this process."""
    configure_log(out_dir, main=is_first_rank())
    from dinoseg.build import instantiate

    node = {key: value for key, value in plain(cfg.mode, resolve=True).items() if key not in LAUNCH_KEYS}
    return instantiate(OmegaConf.create(node))(cfg, out_dir=out_dir)


def is_first_rank() -> bool:
    """Return whether this process writes the run's files: alone, or the first of those torchrun started."""
    return os.environ.get("RANK", "0") == "0"


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


def _resumed(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> tuple[DictConfig, Path | None]:
    """Return the config of the checkpoint that `resume` means, and its run folder if the mode goes on in it."""
    from dinoseg import resume
    from dinoseg.training import checkpoint

    path = resume.locate(cfg, out_dir, cfg.mode.resume_from)
    if path is None:
        print("resume=auto: no earlier run of this recipe has a checkpoint, so this is a new one.", file=sys.stderr)
        return resume.without(cfg), None
    merged = resume.merge(cfg, overrides, checkpoint.read(path))
    return merged, path.parent.parent if cfg.mode.resume_from == "last" else None


def _check_added(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a `+key` that no target takes: nothing would read it, and nothing else would say so."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.key_or_group
        nodes = [OmegaConf.select(cfg, name[:end]) for end, letter in enumerate(name) if letter == "."]
        if override.is_add() and name not in cfg.choices and not any("_target_" in node for node in nodes):
            raise UserError(f"+{name} adds a key that nothing reads. Check its spelling; an existing key needs no +.")


def _drop_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write_config(cfg: DictConfig, out_dir: Path, overrides: Sequence[str]) -> None:
    """Keep the composed config and the command line in `config/`, those of a continuation in `config_2/`, ..."""
    number = len(list(out_dir.glob("config*"))) + 1
    folder = out_dir / ("config" if number == 1 else f"config_{number}")
    folder.mkdir()
    OmegaConf.save(cfg, folder / "config.yaml")
    (folder / "overrides.txt").write_text("\n".join(overrides) + "\n")


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
