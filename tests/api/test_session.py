"""What a mode changes in the caller's process is restored, also after an error."""

import logging
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from caller_settings import foreign_settings
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from dinoseg.__main__ import CONFIGS
from dinoseg.api.compose import compose
from dinoseg.api.modes import train
from dinoseg.api.session import preserve_process_state
from dinoseg.runs.log_file import configure_log
from dinoseg.utils.errors import UserError


def change_log():
    configure_log(None)
    logging.getLogger("matplotlib").setLevel(logging.DEBUG)
    logging.getLogger("of_a_caller").setLevel(logging.DEBUG)


def log():
    """Return the log's handlers and levels."""
    names = ("", "matplotlib", "of_a_caller")
    return [logging.getLogger(name).level for name in names], logging.getLogger().handlers[:], threading.excepthook


def change_environment():
    os.environ |= {"OMP_NUM_THREADS": "7", "OF_A_MODE": "1"}
    os.environ.pop("PATH")


def change_streams():
    sys.stdout, sys.stderr = sys.stderr, sys.stdout


def change_random_states():
    random.seed(9), np.random.seed(9), torch.manual_seed(9)


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def change_torch():
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True


def torch_settings():
    flags = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype(), *flags


def change_accelerate():
    AcceleratorState._shared_state["x"] = PartialState._shared_state["x"] = 1


PARTS = {  # how a mode changes a part of the state, and what reads that
    "log": (change_log, log),
    "warnings": (lambda: warnings.simplefilter("ignore"), lambda: warnings.filters[:]),
    "environment": (change_environment, lambda: dict(os.environ)),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "arguments": (lambda: sys.argv.__setitem__(slice(1, None), ["changed"]), lambda: sys.argv[:]),
    "streams": (change_streams, lambda: (sys.stdout, sys.stderr)),
    "random states": (change_random_states, random_states),
    "torch": (change_torch, torch_settings),
    "start method": (
        lambda: multiprocessing.set_start_method("spawn", force=True),
        lambda: multiprocessing.get_start_method(allow_none=True),
    ),
    "accelerate": (
        change_accelerate,
        lambda: (dict(AcceleratorState._shared_state), dict(PartialState._shared_state)),
    ),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_state_is_restored(part, fails):
    change, read = PARTS[part]
    before = read()
    with suppress(ZeroDivisionError), preserve_process_state():
        change()
        assert read() != before
        1 / (0 if fails else 1)
    assert read() == before


def test_settings_of_the_caller_do_not_reach_the_mode():
    with foreign_settings():
        with preserve_process_state():
            tensor = torch.zeros(1, requires_grad=True)
            assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not tensor.is_inference()
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            assert np.geterr()["invalid"] == "warn"
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert np.geterr()["invalid"] == "raise"


def test_autocast_around_a_mode_caches_no_old_weights():
    weight = torch.nn.Parameter(torch.ones(1, 1))
    with torch.autocast("cpu", torch.bfloat16), preserve_process_state():
        for value in (1, 2):
            with torch.no_grad():
                weight.fill_(value)
            with torch.autocast("cpu", torch.bfloat16):  # as the engine enters it in each step
                assert torch.nn.functional.linear(torch.ones(1, 1), weight) == value


def test_open_log_files_and_disabled_loggers_stay_as_they_are(tmp_path, monkeypatch):
    handler = logging.FileHandler(tmp_path / "log", "w")
    logging.getLogger().addHandler(handler)
    ours = logging.getLogger("dinoseg.training.trainer")
    monkeypatch.setattr(ours, "disabled", True)
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    with preserve_process_state():
        configure_log(None)
        assert ours.isEnabledFor(logging.ERROR)
    assert ours.disabled and logging.root.manager.disable == logging.CRITICAL
    logging.disable(logging.NOTSET)
    logging.getLogger("of_a_caller").error("after")
    logging.getLogger().removeHandler(handler)
    handler.close()
    assert "after" in (tmp_path / "log").read_text()


@dataclass
class CallersOptimizer:
    speed: int = 1


def test_a_hydra_program_can_compose(monkeypatch):
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", dict(store.repo))
    store.store(group="optim", name="adamw", node=CallersOptimizer)
    options = ["mode=help", "head=cnn", "adapter=lora", "loss=dice"]  # which no other test composes
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        before = GlobalHydra.instance().hydra
        # a config of that name is not taken for one of that class
        assert "optimizer" in compose([*options, "trainer=slots", "slots=lock_on"]).optim
        assert GlobalHydra.instance().hydra is before and "optim" in store.repo
        with pytest.raises(Exception, match="optim/adamw"):
            hydra_compose("main", [*options, "inference=whole"])


def test_explained_error_keeps_the_hydra_of_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        before = GlobalHydra.instance().hydra
        with pytest.raises(UserError, match="seed=.{nowhere}.* refers to a key that does not exist"):
            train("demo", seed="${nowhere}", data={"root": "."})
        assert GlobalHydra.instance().hydra is before


def test_a_process_group_of_the_caller_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="destroy_process_group"), preserve_process_state():
            pass
    finally:
        torch.distributed.destroy_process_group()


SPAWNS = """import multiprocessing
from dinoseg.api.session import preserve_process_state
with preserve_process_state():
    pass
process = multiprocessing.get_context("spawn").Process(target=print)
process.start()
process.join()
print("status", process.exitcode)
"""


@pytest.mark.heavy
def test_a_spawned_worker_that_imports_the_script_is_refused(tmp_path):
    (tmp_path / "script.py").write_text(SPAWNS)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=False)
    assert "status 1" in done.stdout and '`if __name__ == "__main__":`' in done.stderr
