"""Exchange of values between ranks: plain data over loopback, never pickles."""

import os
import pickle
import socket
import subprocess
import sys
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import save

from dinoseg.cli.ranks import listen_on_loopback, run_ranks
from dinoseg.training.rank_messages import decode_message, encode_message
from dinoseg.utils.errors import UserError

Pair = namedtuple("Pair", "left right")
NESTED = save({"json": np.frombuffer(b"[" * 2**17, np.uint8)})


def listening_addresses():
    sockets = psutil.Process().net_connections("inet")
    return [each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN]


def meet_and_exchange(cfg, *, out_dir):
    """Stand for a mode: meet the other rank, and return what both have sent."""
    from dinoseg.training.engine import Engine

    engine = Engine("cpu", "fp32")
    engine.wait()
    addresses = engine.gather(listening_addresses())
    rows = engine.gather([(engine.rank, {engine.rank: np.full(1 + 9 * engine.rank, engine.rank)})])
    chosen = engine.broadcast("first" if engine.is_main else None)
    decided = engine.run_on_rank0(lambda: (engine.rank, [0.5, None]))
    engine.close()
    received = [[rank, {key: value.tolist() for key, value in table.items()}] for rank, table in rows]
    return {"addresses": addresses, "rows": received, "chosen": chosen, "decided": decided, "rank": os.environ["RANK"]}


@pytest.fixture(scope="module")
def exchanged_report(tmp_path_factory):
    """Return what rank 0 of two local ranks reports, on a machine whose settings name another interface."""
    node = {"_target_": "test_rank_messages.meet_and_exchange", "_partial_": True, "keeps_folder": False}
    others = [name for name in psutil.net_if_addrs() if not name.startswith("lo")]
    with pytest.MonkeyPatch.context() as patch:
        if others:
            patch.setenv("GLOO_SOCKET_IFNAME", others[0])
        return run_ranks(
            OmegaConf.create({"mode": node, "choices": {"mode": "test"}}), tmp_path_factory.mktemp("run"), 2
        )


def test_local_ranks_listen_on_loopback_only(exchanged_report):
    assert len(exchanged_report["addresses"]) >= 2 and {*exchanged_report["addresses"]} == {"127.0.0.1"}


BY_HAND = """
from dinoseg.cli.ranks import listen_on_loopback
from test_rank_messages import meet_and_exchange
listen_on_loopback()
report = meet_and_exchange(None, out_dir=None)
print(*report["addresses"])
"""


def test_ranks_started_by_hand_listen_on_loopback_only():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ours = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    others = [name for name in psutil.net_if_addrs() if not name.startswith("lo")]
    if others:
        ours["GLOO_SOCKET_IFNAME"] = others[0]
    ours["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", BY_HAND]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env=os.environ | ours | {"RANK": rank, "LOCAL_RANK": rank},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in "01"
        ]
        printed = ranks[0].communicate()[0].split()
        if ranks[0].returncode != 0:
            ranks[1].kill()  # which would wait for the store
    assert {*printed} == {"127.0.0.1"} and len(printed) >= 2


def test_only_127_0_0_1_states_that_all_ranks_are_local(monkeypatch):
    for name, value in {"MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for address in ("localhost", "10.0.0.1", "127.0.0.1"):
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
        listen_on_loopback()
        assert (os.environ["GLOO_SOCKET_IFNAME"] != "eth0") == (address == "127.0.0.1")


def test_taken_port_of_rank_0_is_an_error(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        for name in ("TORCHELASTIC_RUN_ID", "DINOSEG_STORE_SOCKET"):
            monkeypatch.delenv(name, raising=False)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.setenv(name, "")  # restored afterwards
        with pytest.raises(UserError, match=f"MASTER_PORT={port}"):
            listen_on_loopback()


def test_ranks_exchange_values(exchanged_report):
    assert exchanged_report["rows"] == [[0, {"0": [0]}], [1, {"1": [1] * 10}]]
    assert (exchanged_report["chosen"], exchanged_report["decided"]) == ("first", [0, [0.5, None]])


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
    with pytest.raises(TypeError, match="ranks exchange"):
        encode_message(value)


@pytest.mark.parametrize("content", [pickle.dumps([1]), b"", b"\0" * 8, b"\xff" * 64, NESTED])
def test_foreign_messages_are_refused(content):
    with pytest.raises(UserError, match="not a message of a rank"):
        decode_message(content)
