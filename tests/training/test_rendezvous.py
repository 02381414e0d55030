"""Texts that ranks exchange before they have a process group: rank 0 decides, all others receive."""

import itertools
import subprocess
import sys
from datetime import timedelta
from threading import Thread

import pytest
import torch

from dinoseg.training import rendezvous
from dinoseg.utils.errors import UserError

RANK = """
import os
from dinoseg.training.rendezvous import share_from_rank0
from dinoseg.utils.errors import UserError
def refuse():
    raise UserError("no such folder")
def share(text):
    return share_from_rank0(text, connect=300, wait=300)
rank = os.environ["RANK"]
lines = [share(lambda: "first of " + rank), share(lambda: "second of " + rank)]
try:
    share(refuse)
except UserError as error:
    lines.append(str(error))
open(rank + ".txt", "w").write("; ".join(lines))
"""


def test_every_rank_gets_texts_and_errors_of_rank_0(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    subprocess.run([*torchrun, "rank.py"], cwd=tmp_path, check=True)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert texts == ["first of 0; second of 0; no such folder"] * 2


def test_rank_0_waits_until_its_text_is_read(monkeypatch):
    store, received = torch.distributed.HashStore(), []
    ranks = iter([0, 1])
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, next(ranks), 2)]))
    monkeypatch.setattr(rendezvous, "_numbers", itertools.repeat(0))

    def share():
        received.append(rendezvous.share_from_rank0(lambda: "text", connect=300, wait=300))

    first = Thread(target=share)
    first.start()
    store.get("start_None/text_0")  # waits for it
    first.join(1)  # the store would end with the process of rank 0
    assert first.is_alive()
    share()
    first.join()
    assert received == ["text", "text"]


def test_rank_that_gets_no_text_names_address_and_remedy(monkeypatch):
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host7", "MASTER_PORT": "29"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"Rank 1 of 2 .*host7:29.*engine.rendezvous_timeout"):
        rendezvous.share_from_rank0(lambda: pytest.fail("only rank 0 decides"), connect=1, wait=0.01)
    assert store.timeout == timedelta(seconds=0.01)


def test_restarted_ranks_read_nothing_of_dead_ones(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    rendezvous.open_store(1)[0].set("address", "of a dead rank")
    assert rendezvous.open_store(1)[0].check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not rendezvous.open_store(1)[0].check(["address"])
