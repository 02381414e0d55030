"""Tampered checkpoint files in every mode that takes one: each is refused in one message; none runs or writes."""

import copy
import json
import os

import pytest
import torch
from command_line import SMALL, call, write_data

from dinoseg.training import checkpoint

HOOK = "torch.nn.modules.module._WrappedHook.__call__"
IMPORTED = "torch.nn.utils._deprecation_utils.lazy_deprecated_import"


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    where = tmp_path_factory.mktemp("hostile")
    write_data(where / "data")
    assert call(where, "mode=train", *SMALL, "mode.metrics_only=true", "hydra.run.dir=outputs/base/one").status == 0
    return where


@pytest.fixture(scope="module")
def sound(where):
    return checkpoint.read(where / "outputs/base/one/checkpoints/last.safetensors")


def write_tampered(where, sound, changes, tensors=None):
    """Write a checkpoint with values put at places of its description, and return its path."""
    info = copy.deepcopy(sound.info)
    for place, value in changes.items():
        node, (*above, last) = info, place.split("/")
        for key in above:
            node = node[key]
        node[last] = value
    path = where / "evil.safetensors"
    checkpoint.write(path, sound.tensors | (tensors or {}), {k: v for k, v in info.items() if k != "format"})
    return path


def files(where):
    return {path for path in where.rglob("*") if "outputs" not in path.parts} - {where / "evil.safetensors"}


def shell(target):
    """Return a node that would run a shell command in the folder of the checkpoint."""
    return {"_target_": target, "_partial_": True, "args": ["os", "system", "touch ran"]}


CASES = {
    "a hook in the head": {"config/head": shell(HOOK)},
    "an import in the head": {"config/head": shell(IMPORTED)},
    "a hook in the loss": {"config/loss/criterion": shell(HOOK)},
    "a shell in the adapter": {"config/adapter": shell("os.system")},
    "a shell in the data": {"config/data/augment": shell("os.system")},
    "a shell nested in a good node": {"config/adapter/bits": shell("os.system")},
    "a renderer": {"config/data/reader/_target_": "dinoseg.extensions.rendering.surgery.write.render_dataset"},
    "weights of a stranger": {"config/backbone/weights": "evil/weights"},
    "an interpolation": {"config/data/root": "${oc.env:HOME}"},
    "half an interpolation": {"config/data/root": "${"},
    "a list without end": {"config/data/augment/scale": [0] * 200_000},
    "a long list": {"config/backbone/arch/hidden_size": [0] * 600},
    "a huge width": {"config/backbone/arch/hidden_size": 65520},
    "a huge depth": {"config/backbone/arch/num_hidden_layers": 10**6},
    "remote code": {"config/backbone/arch/auto_map": {"AutoModel": "evil--x.y"}},
    "kernels of a stranger": {"config/backbone/arch/attn_implementation": "evil/kernels"},
    "labels without end": {"config/backbone/arch/id2label": {"0": "x"}},
    "a long class": {"classes": ["dark", "b" * 3000]},
    "an option of nobody": {"choices/head": "nobodys"},
    "an option elsewhere": {"choices/head": "../../../../evil"},
    "a class of another name": {"targets/head": "os.system"},
    "a null group": {"config/data": None},
    "a number for a head": {"config/head": 3},
    "a number for the palette": {"config/data/palette": 3},
    "a list for the ignored id": {"config/data/ignore_index": [1]},
}

ALIKE = {  # each has a quick sibling of the same check
    *("an import in the head", "a hook in the loss", "a shell in the data", "half an interpolation", "a huge depth"),
    *("kernels of a stranger", "labels without end", "a number for the palette"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.heavy] * (name in ALIKE)) for name, case in CASES.items()]
)
def test_a_tampered_file_is_refused(where, sound, case):
    path = write_tampered(where, sound, case)
    before = files(where)
    done = call(where, "mode=export", f"resume={path}", "engine=cpu")
    assert done.status == 1 and done.err.startswith("error: ") and "Traceback" not in done.err, done.err
    assert files(where) == before and len(done.err) < 1500


@pytest.mark.parametrize(
    "mode", ["predict", "export", "train", *(pytest.param(mode, marks=pytest.mark.heavy) for mode in ("eval", "track"))]
)
def test_every_mode_refuses_targets_in_a_checkpoint(where, sound, mode):
    path = write_tampered(where, sound, CASES["a hook in the head"])
    before = files(where)
    source = ("input=data/val/images",) if mode in ("predict", "track") else ()
    done = call(where, f"mode={mode}", f"resume={path}", "engine=cpu", *source)
    assert done.status == 1 and "is refused: saved configs set no key" in done.err, done.err
    assert files(where) == before


def test_non_finite_weights_are_refused(where, sound):
    name = "model/head.classify.weight"
    path = write_tampered(where, sound, {}, {name: torch.full_like(sound.tensors[name], float("nan"))})
    refused = call(where, "mode=export", f"resume={path}", "engine=cpu")
    assert refused.status == 1 and "hold NaN or infinity" in refused.err


def test_a_sound_file_is_accepted(where, sound):
    assert json.dumps(sound.info) and os.path.exists(sound.path)
    assert call(where, "mode=export", f"resume={write_tampered(where, sound, {})}", "engine=cpu").status == 0


def test_dangling_interpolation_with_a_checkpoint_is_one_message(where):
    done = call(where, "mode=export", "resume=outputs/base/one", "engine=cpu", "head.layers=${.x}")
    assert done.status == 1 and done.err.startswith("error: resume="), done.err
    assert "backbone.layers" in done.err  # which points to it
    assert "Interpolation" not in done.err and "has no usable value" in done.err
