"""One mode in this process: its function, and errors of libraries on memory and on other ranks."""

import atexit
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import set_start_method
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.cli.job_checks import LAUNCH_KEYS, check_engine
from dinoseg.cli.joined_ranks import is_first_rank
from dinoseg.config.nodes import instantiate
from dinoseg.runs.log_file import announce, configure_log
from dinoseg.utils.collection import collection_paused
from dinoseg.utils.errors import UserError

_GONE = re.compile("by peer|remote process exited")  # in gloo's and NCCL's messages on a lost rank
_STUCK = re.compile("[Tt]imed out|[Ww]ait timeout")  # if a rank does not respond: gloo, NCCL and the store


class LostRank(UserError):
    """Error of a rank that waited for another one that is gone or stuck: the other one has failed."""


def run_mode(cfg: DictConfig, out_dir: Path, ranks: int = 1) -> Any:
    """Call the mode's function in this process, one of `ranks` that share the CUDA devices of this machine."""
    # or spawned processes would spawn theirs, too: seconds per loader worker, and joblib's could not start any
    set_start_method(None, force=True)
    if cfg.mode.get("keeps_folder", True):
        configure_log(out_dir if is_first_rank() else None)
    if "torch" not in sys.modules and cfg.mode.get("keeps_folder", True):
        announce(f"mode={cfg.choices.mode}: importing libraries")
    try:
        with _lost_ranks_as_user_errors():
            with collection_paused():
                check_engine(cfg, ranks)
                mode = instantiate(cfg.mode, exclude=LAUNCH_KEYS)
            # not mode(...): parameters in errors of the parts that it runs are not its own
            return mode.func(cfg, out_dir=out_dir, **mode.keywords)
    finally:
        _leave_group()


@contextmanager
def shortages_as_user_errors() -> Iterator[None]:
    """Convert out-of-memory errors of libraries into `OutOfMemory`, in ranks too; other errors pass.

    Raises:
        OutOfMemory: with the library's own message.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from dinoseg.inference.memory import as_out_of_memory  # imports torch

        if (short := as_out_of_memory(error)) is None:
            raise
        raise short from error


@contextmanager
def _lost_ranks_as_user_errors() -> Iterator[None]:
    """Convert torch's errors about ranks that are gone or stuck into `LostRank`; other errors pass.

    Raises:
        LostRank: stating which of both.
    """
    try:
        yield
    except RuntimeError as error:
        message = next((line for line in str(error).splitlines() if line), "")
        if "WORLD_SIZE" not in os.environ or not (_GONE.search(message) or _STUCK.search(message)):
            raise
        if _GONE.search(message):
            raise LostRank(f"Lost the connection to another rank ({message}): see its messages.") from error
        raise LostRank(
            f"Timed out waiting for another rank ({message}). It may hang: `py-spy dump --pid` shows where. If it is "
            "only slower, raise engine.rank_timeout. resume=auto resumes from the last checkpoint."
        ) from error


def _leave_group() -> None:
    """Destroy the process group, however the mode ended: an interpreter that exits within one may hang.

    The group's threads end when nothing references it. Reference cycles (a model on ranks, an error's frames) are
    therefore collected before the interpreter exits: a thread that needs the interpreter later aborts the process.
    """
    if "WORLD_SIZE" in os.environ:
        atexit.register(gc.collect)
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
