"""Isolation of modes that run in the caller's process: what they change in it is restored afterwards."""

import logging
import multiprocessing
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from typing import Any

import numpy as np
import torch

from dinoseg.runs.log_file import NOISY
from dinoseg.training.engine import lent_accelerate
from dinoseg.utils.errors import UserError
from dinoseg.utils.torch_defaults import default_settings

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _environment() -> Iterator[None]:
    """Restore environment variables."""
    variables = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ |= {name: value for name, value in variables.items() if os.environ.get(name) != value}


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore after the block, whatever ends it, the state of the process that modes change.

    These are the log, standard streams, random states, settings of torch, NumPy and accelerate,
    multiprocessing's start method, environment variables, the current folder, `sys.argv` and warning filters. Calls
    from several threads run one after another.

    Raises:
        UserError: a worker process calls it while it imports the caller's script, or torch has a process group.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "A worker process imports this script and runs it again. Put the calls of dinoseg below "
            '`if __name__ == "__main__":`.'
        )
    with _ONE_AT_A_TIME, ExitStack() as stack:
        for preserve in (_environment, _interpreter, _log, _torch):
            stack.enter_context(preserve())
        yield


@contextmanager
def _interpreter() -> Iterator[None]:
    """Restore the current folder, the command line, warning filters and the start method of processes."""
    folder, argv = os.getcwd(), sys.argv[:]
    start_method = multiprocessing.get_start_method(allow_none=True)
    with warnings.catch_warnings():
        try:
            yield
        finally:
            os.chdir(folder)
            sys.argv[:] = argv
            multiprocessing.set_start_method(start_method, force=True)


@contextmanager
def _log() -> Iterator[None]:
    """Restore handlers and levels of the log, standard streams, and the report of errors in threads."""
    root = logging.getLogger()
    known = [logging.getLogger(name) for name in (*root.manager.loggerDict, *NOISY)]
    levels = [(each, each.level, each.disabled) for each in (root, *known)]
    handlers, streams, hook, disabled = (
        root.handlers[:],
        (sys.stdout, sys.stderr),
        threading.excepthook,
        logging.root.manager.disable,
    )
    errors = [(each, each.errors) for each in streams if isinstance(each, TextIOWrapper)]
    root.handlers[:] = []  # `basicConfig(force=True)` closes the handlers that it finds
    logging.disable(logging.NOTSET)
    for each in known:
        each.disabled = each.disabled and not each.name.startswith("dinoseg.")  # as `dictConfig` leaves older loggers
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        for each, level, was_disabled in levels:
            each.setLevel(level)
            each.disabled = was_disabled
        logging.disable(disabled)
        sys.stdout, sys.stderr = streams
        for stream, mode in errors:
            stream.reconfigure(errors=mode)
        threading.excepthook = hook


@contextmanager
def _torch() -> Iterator[None]:
    """Begin with torch's default settings, and restore the caller's, random states and what accelerate stores."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UserError(
            "torch.distributed has a process group, and dinoseg creates its own. Call "
            "torch.distributed.destroy_process_group() first."
        )
    settings: tuple[tuple[Any, Any], ...] = (
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    )
    cudnn: Any = torch.backends.cudnn
    flags = {name: getattr(cudnn, name) for name in ("benchmark", "deterministic")}
    before = [get() for get, _ in settings]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    on_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with default_settings(), lent_accelerate():
            yield
    finally:
        for (get, change), value in zip(settings, before, strict=True):
            if get() != value:
                change(value)
        for name, value in flags.items():
            setattr(cudnn, name, value)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_cuda is not None:
            torch.cuda.set_rng_state_all(on_cuda)
        elif torch.cuda.is_initialized():  # by the mode: as if the caller used CUDA for the first time
            torch.cuda.manual_seed_all(torch.initial_seed())
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)
