"""Ranks: their results, their errors and signals; the modes without torch, so that they start in a moment."""

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import time
import weakref

import pytest
from omegaconf import OmegaConf

from dinoseg.cli import ranks
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Interrupted


def mode(cfg, *, out_dir, does):
    """Stand for a mode: what each rank does is named, and the first one's result is large."""
    rank = int(os.environ["RANK"])
    if does == f"rank {rank} fails":
        raise UserError("a mask is missing")
    if does == f"rank {rank} is short":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    if does == f"rank {rank} dies":
        os._exit(7)
    if does == f"rank {rank} is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "rank 1 breaks and 0 sees it":
        while rank and not (out_dir / "seen").exists():
            time.sleep(0.01)
        (out_dir / "seen").touch()
        time.sleep(rank)  # the other one has ended
        raise RuntimeError("broken" if rank else "Read error [127.0.0.1]:1: Connection reset by peer")
    if does == "rank 1 hangs" and not rank:
        while not (out_dir / "ready1").exists():
            time.sleep(0.01)
        raise RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete")
    if does.startswith("rank") or does == "waits":
        (out_dir / f"ready{rank}").touch()
        time.sleep(600 if does == "waits" else 60)  # until a signal, or the other one's failure, ends it
    threads = {"said": os.environ["OMP_NUM_THREADS"], "here": os.environ["LOCAL_WORLD_SIZE"]}
    if does == "says its threads":
        return threads
    if does == "asks torch for its threads":
        import torch

        return {"threads": torch.get_num_threads(), **threads}
    gc.disable()
    left = type("Left", (), {})()
    left.itself, seen = left, weakref.ref(left)
    atexit.register(lambda: (out_dir / f"left{rank}").write_text(str(seen() is not None)))
    method = multiprocessing.get_start_method()
    return {"matrix": [[0] * 150] * 150, "world_size": os.environ["WORLD_SIZE"], "method": method, **threads}


def run(where, does):
    cfg = {"mode": {"_target_": "test_ranks.mode", "_partial_": True, "does": does, "keeps_folder": False}}
    return ranks.run_ranks(OmegaConf.create({**cfg, "choices": {"mode": "test"}}), where, 2)


@pytest.fixture(scope="module")
def finished_ranks(tmp_path_factory):
    """Return the folder and the result of ranks that end well, and leave a cycle of references."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        return folder, run(folder, "ends well")


def test_ranks_return_a_result_larger_than_a_pipe(finished_ranks):
    result = finished_ranks[1]
    assert (result["matrix"], result["world_size"]) == ([[0] * 150] * 150, "2")
    assert result["method"] == multiprocessing.get_context().get_start_method()  # as any process starts others


def test_cyclic_references_are_freed_at_exit(finished_ranks):
    """As of a model on ranks, which keeps the group and its threads."""
    assert [(finished_ranks[0] / f"left{rank}").read_text() for rank in range(2)] == ["False", "False"]


def test_ranks_share_the_processors(finished_ranks, tmp_path, monkeypatch):
    threads = str(max(1, count_cores() // 2))
    assert (finished_ranks[1]["said"], finished_ranks[1]["here"]) == (threads, "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")  # of a step: what this process may use of it
    assert run(tmp_path, "says its threads") == {"said": "1", "here": "2"}


@pytest.mark.heavy
def test_torch_has_the_threads_of_a_rank(tmp_path, monkeypatch):
    """Before torch is there, and accelerate, which divides the machine's cores, however few of them may be used."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6400")
    threads = max(1, count_cores() // 2)
    assert run(tmp_path, "asks torch for its threads") == {"threads": threads, "said": str(threads), "here": "2"}


def test_process_group_is_closed_however_a_mode_ends(tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("RANK", "1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    node = {"_target_": "test_ranks.mode", "_partial_": True, "does": "rank 1 fails", "keeps_folder": False}
    with pytest.raises(UserError, match="a mask is missing"):
        ranks.run_mode(OmegaConf.create({"mode": node}), tmp_path)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("rank 1 fails", "Rank 1 ended with status 1: see its message above."),
        ("rank 0 dies", "Rank 0 .* status 7"),
        ("rank 1 is killed", "Rank 1 was killed by SIGKILL.*resume=auto resumes"),
    ],
)
def test_failing_rank_ends_all(tmp_path, monkeypatch, does, message):
    monkeypatch.setattr(ranks, "_GRACE", 0.1)
    with pytest.raises(UserError, match=message):
        run(tmp_path, does)


@pytest.mark.heavy
def test_a_shortage_of_memory_in_a_rank_is_a_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ranks, "_GRACE", 0.1)
    with pytest.raises(UserError, match="Rank 1 ended with status 1: see its message above"):
        run(tmp_path, "rank 1 is short")
    said = capfd.readouterr().err
    assert "error (rank 1): Out of memory (DefaultCPUAllocator" in said and "Traceback" not in said


def test_traceback_is_that_of_the_failing_rank(tmp_path, capfd):
    with pytest.raises(UserError, match="Rank 1 ended with status 1: see its message above"):
        run(tmp_path, "rank 1 breaks and 0 sees it")
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1 and "RuntimeError: broken" in said
    assert "error (rank 0): Lost the connection to another rank (Read error" in said


def test_hanging_rank_is_named_with_its_position(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ranks, "_GRACE", 0.1)
    monkeypatch.setattr(ranks, "_LAST_WORDS", 10.0)
    expected = "Rank 1 hung: the other ranks waited.*engine.rank_timeout.*resume=auto resumes"
    with pytest.raises(UserError, match=expected):
        run(tmp_path, "rank 1 hangs")
    said = capfd.readouterr().err
    assert "error (rank 0): Timed out waiting for another rank" in said
    assert "Traceback" not in said and 'test_ranks.py", line' in said and "in mode" in said


def test_a_signal_to_the_first_process_reaches_all(tmp_path):
    def strike():
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=strike).start()
    with pytest.raises(Interrupted) as ended:
        run(tmp_path, "waits")
    assert ended.value.status == 143
