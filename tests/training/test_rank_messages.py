"""Exchange of values between ranks: texts before they have a process group, then plain data over loopback."""

import itertools
import os
import pickle
import socket
import subprocess
import sys
from collections import namedtuple
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
import torch
from mistakes import assert_refused
from omegaconf import OmegaConf
from safetensors.numpy import save

from dinoseg.cli.joined_ranks import listen_on_loopback
from dinoseg.cli.ranks import run_ranks
from dinoseg.training import rendezvous
from dinoseg.training.rendezvous import decode_message, encode_message
from dinoseg.utils.errors import UserError

Pair = namedtuple("Pair", "left right")
NESTED = save({"json": np.frombuffer(b"[" * 2**17, np.uint8)})


def meet_and_exchange(cfg, *, out_dir):
    """Stand for a mode: meet the other rank, and return what both have sent."""
    from dinoseg.training.engine import Engine

    engine = Engine("cpu", "fp32")
    engine.wait()
    sockets = psutil.Process().net_connections("inet")
    addresses = engine.gather([each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN])
    rows = engine.gather([(engine.rank, {engine.rank: np.full(1 + 9 * engine.rank, engine.rank)})])
    chosen = engine.broadcast("first" if engine.is_main else None)
    decided = engine.run_on_rank0(lambda: (engine.rank, [0.5, None]))
    engine.close()
    received = [[rank, {key: value.tolist() for key, value in table.items()}] for rank, table in rows]
    return {"addresses": addresses, "rows": received, "chosen": chosen, "decided": decided, "rank": os.environ["RANK"]}


def set_other_interface(patch):
    """Let the machine's settings name another interface than loopback, if there is one."""
    others = [name for name in psutil.net_if_addrs() if not name.startswith("lo")]
    if others:
        patch.setenv("GLOO_SOCKET_IFNAME", others[0])


@pytest.fixture(scope="module")
def exchanged_report(tmp_path_factory):
    """Return what rank 0 of two local ranks reports, on a machine whose settings name another interface."""
    node = {"_target_": "test_rank_messages.meet_and_exchange", "_partial_": True, "keeps_folder": False}
    job = OmegaConf.create({"mode": node, "choices": {"mode": "test"}})
    with pytest.MonkeyPatch.context() as patch:
        set_other_interface(patch)
        return run_ranks(job, tmp_path_factory.mktemp("run"), 2)


@pytest.mark.heavy
def test_local_ranks_listen_on_loopback_only(exchanged_report):
    assert len(exchanged_report["addresses"]) >= 2 and {*exchanged_report["addresses"]} == {"127.0.0.1"}


@pytest.mark.heavy
def test_ranks_exchange_values(exchanged_report):
    assert exchanged_report["rows"] == [[0, {"0": [0]}], [1, {"1": [1] * 10}]]
    assert (exchanged_report["chosen"], exchanged_report["decided"]) == ("first", [0, [0.5, None]])


def refuse():
    raise UserError("no such folder")


def share_and_exchange():
    """Share two texts and an error of rank 0, then meet: print what this rank has received."""
    rank = os.environ["RANK"]
    listen_on_loopback()
    for text in (lambda: f"first of {rank}", lambda: f"second of {rank}", refuse):
        try:
            print(rendezvous.share_from_rank0(text, connect=300, wait=300))
        except UserError as error:
            print(error)
    print(*{*meet_and_exchange(None, out_dir=None)["addresses"]}, flush=True)


@pytest.mark.heavy
def test_ranks_started_by_hand_listen_on_loopback_only(monkeypatch):
    """They also get the texts and the errors of rank 0 before they meet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    set_other_interface(monkeypatch)
    ours = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ours["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", "import test_rank_messages; test_rank_messages.share_and_exchange()"]
    with ExitStack() as stack:
        ranks = []
        for rank in "01":
            env = os.environ | ours | {"RANK": rank, "LOCAL_RANK": rank}
            started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
            ranks.append(stack.enter_context(started))
        printed = [ranks[0].communicate()[0]]
        if ranks[0].returncode != 0:
            ranks[1].kill()  # which would wait for the store
        printed.append(ranks[1].communicate()[0])
    assert printed == ["first of 0\nsecond of 0\nno such folder\n127.0.0.1\n"] * 2


def test_only_127_0_0_1_states_that_all_ranks_are_local(monkeypatch):
    for name, value in {"MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for address in ("localhost", "10.0.0.1", "127.0.0.1"):
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
        listen_on_loopback()
        assert (os.environ["GLOO_SOCKET_IFNAME"] != "eth0") == (address == "127.0.0.1")


def test_messages_keep_types_and_arrays():
    value = {
        "text": ["Döhe \udcff", None, True, 3, float("inf")],
        7: (1, (2.5, [])),
        "tuple": {"array": {}},
        "arrays": [np.arange(6).reshape(2, 3).T, np.zeros((0, 3), bool), np.float32(0.5), np.array(4, np.uint8)],
    }
    again = decode_message(encode_message(value))
    for array, copy in zip(value.pop("arrays"), again.pop("arrays"), strict=True):
        np.testing.assert_array_equal(copy, array, strict=isinstance(array, np.ndarray))
    assert again == value and [type(key) for key in again] == [str, int, str]


@pytest.mark.parametrize("value", [{1}, b"", Pair(1, 2), object(), np.array([{}]), [Pair]])
def test_messages_refuse_other_types(value):
    assert_refused(lambda: encode_message(value), "ranks exchange", error=TypeError)


@pytest.mark.parametrize("content", [pickle.dumps([1]), b"", b"\0" * 8, b"\xff" * 64, NESTED])
def test_foreign_messages_are_refused(content):
    assert_refused(lambda: decode_message(content), "not a message of a rank")


@pytest.mark.parametrize(("decide", "text"), [(lambda: "text", "text"), (refuse, "refused: no such folder")])
def test_rank_0_waits_until_its_text_or_error_is_read(monkeypatch, decide, text):
    store = torch.distributed.HashStore()
    received = []
    ranks = iter([0, 1])
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, next(ranks), 2)]))
    monkeypatch.setattr(rendezvous, "_numbers", itertools.repeat(0))

    def share():
        try:
            received.append(rendezvous.share_from_rank0(decide, connect=300, wait=300))
        except UserError as error:
            received.append(f"refused: {error}")

    first = Thread(target=share)
    first.start()
    store.get("start_None/text_0")  # waits for it
    first.join(1)  # the store would end with the process of rank 0
    assert first.is_alive()
    share()
    first.join()
    assert received == [text, text]


def test_rank_that_gets_no_text_names_address_and_remedy(monkeypatch):
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host7", "MASTER_PORT": "29"}.items():
        monkeypatch.setenv(name, value)
    words = ("Rank 1 of 2 ", "host7:29", "engine.rendezvous_timeout")
    decide = partial(pytest.fail, "only rank 0 decides")
    assert_refused(lambda: rendezvous.share_from_rank0(decide, connect=1, wait=0.01), *words)
    assert store.timeout == timedelta(seconds=0.01)


def test_first_rank_logs_how_long_it_waits_for_the_others(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 1)]))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "host7"}.items():
        monkeypatch.setenv(name, value)
    assert rendezvous.share_from_rank0(lambda: "text", connect=7, wait=1) == "text"
    assert "waiting for 1 ranks at host7, at most 7 s (engine.rendezvous_timeout)" in capsys.readouterr().err


def test_restarted_ranks_read_nothing_of_dead_ones(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    rendezvous.open_store(1)[0].set("address", "of a dead rank")
    assert rendezvous.open_store(1)[0].check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not rendezvous.open_store(1)[0].check(["address"])
