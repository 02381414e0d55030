import gc
import logging
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from cached_composition import PATCHES

from dinoseg.utils import cores
from dinoseg.utils.errors import UserError

ROOT = Path(__file__).parents[1]
PROCESSES = {"subprocess", "multiprocessing", "ranks", "command"}  # what a test file that starts processes imports
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: sums are then the same to the last bit
# processes that tests start import this checkout, whichever one is installed
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
torch.set_num_threads(1)
for each in PATCHES:
    each.start()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave out what this machine cannot run, and mark as slow what runs commands, starts processes or composes."""
    for item in items:
        names = vars(item.module)
        runners = (names.get("call"), names.get("succeed"))
        runs_commands = any(getattr(runner, "__module__", None) == "command_line" for runner in runners)
        if runs_commands or PROCESSES & names.keys() or "compose" in item.fixturenames:
            item.add_marker("slow")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    yield  # tests are selected
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    counts = Counter(item.path for item in items)
    # long files begin first, so that no worker ends alone
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path]))


def pytest_collection_finish():
    """Take what imports and collection have made out of garbage collection, a tenth of the time of short commands."""
    from dinoseg.extensions.auto.fake_tensors import fake_tensor_mode

    with fake_tensor_mode():  # which looks for cached functions, and finds none that are frozen
        pass
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # libraries report what is not collected when Python ends


@pytest.fixture(autouse=True)
def no_stray_log_handlers():
    """Begin with pytest's own handlers and level: a job that a test runs in this process leaves others."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers[:]:
        if not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)
            handler.close()


@pytest.fixture(autouse=True)
def one_thread():
    """Let processes that the test starts have one thread, even if a test before has removed the variable."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cores._written.clear()


@pytest.fixture
def set_cores(monkeypatch):
    """Return a function that lets this process use so many processors, whatever the system asks for them."""

    def set_count(count):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: count)

    return set_count


@pytest.fixture(scope="session")
def compose():
    """Compose the config as the command line does."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from dinoseg.__main__ import CONFIGS
    from dinoseg.config.job import job_config
    from dinoseg.config.resolvers import register_resolvers

    def build(*overrides):
        register_resolvers()
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            cfg = hydra_compose("main", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return job_config(cfg, cfg.hydra)

    return build


@pytest.fixture
def tiny_backbone():
    """Build a random two-block DINOv3-type transformer with 8 px patches, 24 wide."""
    from tiny_parts import tiny_vit

    return tiny_vit


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """Train a segmenter with head=cnn and a model of slots, and write a clip of 7 frames with its first mask."""
    from command_line import train_both

    return train_both(tmp_path_factory.mktemp("trained_once"))


@pytest.fixture(scope="module")
def trained(trained_once, tmp_path_factory):
    """Link all of `trained_once` in a folder that a test file writes into."""
    from command_line import link_all

    return link_all(trained_once, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def experiments(monkeypatch):
    """Let trainings end with an error where their loop would begin; return what each loop was given."""
    given = []

    def stop(experiment):
        given.append(experiment)
        raise UserError("the loop begins")

    monkeypatch.setattr("dinoseg.modes.train.fit", stop)
    return given
