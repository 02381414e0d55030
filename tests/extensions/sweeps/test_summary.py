"""mode=summary counts a recipe's parameters, and needs neither weights nor a network for it."""

import json
import socket

import pytest
from command_line import succeed
from tabulate import tabulate
from transformers import AutoModel

# DINOv3 ViT-L/16 as Meta published it: 24 blocks, 1024 wide; LoRA of rank 16 on every linear layer; 3-layer MLP head
LARGE = {
    "backbone": {"total": 303_129_600, "trainable": 0},
    "adapter": {"total": 7_077_888, "trainable": 7_077_888},
    "head": {"total": 15_736_320, "trainable": 15_736_320},
    "model": {"total": 325_943_808, "trainable": 22_814_208},
}


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a summary needs no weights and no network")

    monkeypatch.setattr(AutoModel, "from_pretrained", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def summary(where, *arguments):
    done = succeed(where, "mode=summary", *arguments)
    (path,) = where.glob("outputs/*/summary_*/summary.json")
    return json.loads(path.read_text()), done.out


def test_summary_of_the_published_recipe(offline, tmp_path):
    counts, out = summary(tmp_path, "hparam=sarrarp_lora")
    assert counts == LARGE
    assert "backbone=dinov3_vitl16 adapter=lora_all head=mlp" in out
    rows = [(part, f"{row['total']:,}", f"{row['trainable']:,}") for part, row in LARGE.items()]
    for line in tabulate(rows, tablefmt="plain", colalign=("left", "right", "right")).splitlines():
        assert line.split() in [shown.split() for shown in out.splitlines()]


SHALLOW = 795_648 + 4 * 12_597_248  # the same with four blocks


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # all but the mask token, which only masked pre-training reads
        ("hparam=sarrarp_full", {"backbone": (SHALLOW, SHALLOW - 1024), "adapter": (0, 0)}),
        ("hparam=sarrarp_lora adapter.rank=8", {"adapter": (589_824,) * 2}),
        ("hparam=sarrarp_lora adapter=lora adapter.rank=8", {"adapter": (262_144,) * 2}),
        ("hparam=person_multiscale", {"adapter": (0, 0), "head": (2 * 4 * 384 + 4 * 384 * 2 + 2,) * 2}),
    ],
)
def test_other_recipes(offline, tmp_path, line, expected):
    counts, _ = summary(tmp_path, *line.split(), "backbone.arch.num_hidden_layers=4")
    assert {part: (counts[part]["total"], counts[part]["trainable"]) for part in expected} == expected
    for kind in ("total", "trainable"):
        assert counts["model"][kind] == sum(counts[part][kind] for part in ("backbone", "adapter", "head"))
