"""Imports of torch: what is set and what is checked by then, in child processes of each mode."""

import importlib
import json
import os
import subprocess
import sys

import pytest

import dinoseg

MODEL = "resume=dinoseg:surgery"
CLASSES = "data.classes=[a,b]"
TRAIN = ("mode=train", "data=folder", CLASSES)
INPUTS = {"eval": (), "predict": ("input=.",), "track": ("input=.",), "export": (), "serve": (), "app": ()}
COMMANDS = [
    (*TRAIN, "data.root=."),
    (*TRAIN, "data.root=.", "resume=auto"),
    ("mode=train", MODEL),
    *((f"mode={mode}", *words, *more) for mode, words in INPUTS.items() for more in ((), (MODEL,))),
    # what is no path is not looked for
    ("mode=predict", MODEL, "input='*.png'"),
    ("mode=predict", MODEL, "input=val"),
    ("mode=eval", MODEL, "backbone.weights=org/name"),
]
CALLS = ["dinoseg.train", "dinoseg.create_model", "dinoseg.open_dataset", "dinoseg.load('dinoseg:surgery')"]
MISSING = {
    (*TRAIN, "data.root=gone"): "data.root=gone: file or folder not found. Give the folder that holds the dataset.",
    (*TRAIN, "data.root=.", "init=gone"): "init=gone: file or folder not found. Give a run folder",
    (*TRAIN, "data.root=.", "backbone.weights=g/gone.pth"): "backbone.weights=g/gone.pth: file or folder not found",
    ("mode=eval", "resume=gone"): "resume=gone: file or folder not found. Give a run folder",
    ("mode=eval", f"resume=[{MODEL.partition('=')[2]},gone]"): "resume=gone: file or folder not found.",
    ("mode=eval", MODEL, "data.root=gone"): "data.root=gone: file or folder not found.",
    ("mode=predict", MODEL, "input=gone.png"): "input=gone.png: file or folder not found.",
    ("mode=track", MODEL, "input=.", "labels=gone"): "labels=gone: file or folder not found.",
    ("mode=serve", "mode.model=gone.onnx"): "mode.model=gone.onnx: file or folder not found.",
}
DEVICES = {
    (*TRAIN, "data.root=.", "engine.device=mps"): "engine.device=mps is not available here.",
    (*TRAIN, "data.root=.", "engine.device=mps", "engine.devices=2"): "engine.device=mps is not available here.",
    ("mode=predict", MODEL, "input=.", "engine.devices=2"): "engine.devices=2: this mode runs on 1.",
}
# each job runs in a fork, which ends when the module is to be imported
STOP_AT_IMPORT = """
import json, os, sys
sys.path.insert(0, os.getcwd())
module, commands, calls = json.loads(sys.argv[1])
class Finder:
    def find_spec(self, name, *rest):
        if name == module:
            print("at import:", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
import dinoseg.__main__, dinoseg.cli.launch, dinoseg.cli.typos
for job in [*commands, *calls]:
    if (child := os.fork()):
        os.waitpid(child, 0)
        continue
    if isinstance(job, str):
        eval(job)
    sys.argv[1:] = job
    dinoseg.__main__.main()
    os._exit(1)
"""
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts each job by a fork")


@pytest.fixture
def run_until_import(tmp_path):
    """Return a function that runs jobs until each imports a module, and returns what they have printed."""

    def run(module, commands, calls=(), **variables):
        ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        environment = {key: value for key, value in os.environ.items() if key not in ours} | variables
        command = [sys.executable, "-c", STOP_AT_IMPORT, json.dumps([module, list(commands), list(calls)])]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if line.startswith("at import:")], done.stderr

    return run


def test_spin_limit_is_set_when_torch_is_imported(run_until_import):
    printed, errors = run_until_import("torch", COMMANDS, CALLS)
    assert printed == [f"at import: {dinoseg._SPINS}"] * len([*COMMANDS, *CALLS]), errors
    assert run_until_import("torch", (), CALLS, GOMP_SPINCOUNT="7")[0] == ["at import: 7"] * len(CALLS)


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_given_waiting_policy_is_unchanged(monkeypatch, given):
    monkeypatch.setattr(os, "environ", {**given})
    dinoseg._set_library_variables()
    assert os.environ == given


def test_import_enables_the_mps_fallback_on_a_mac(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("os.environ", environment := {})
    importlib.reload(dinoseg)
    assert environment == {"GOMP_SPINCOUNT": dinoseg._SPINS, "PYTORCH_ENABLE_MPS_FALLBACK": "1"}


@pytest.mark.parametrize(
    ("module", "mistakes"), [("torch", MISSING), ("dinoseg.modes", DEVICES)], ids=["paths", "devices"]
)
def test_mistake_is_found_before_the_import(run_until_import, module, mistakes):
    printed, errors = run_until_import(module, mistakes)
    assert not printed and [message for message in mistakes.values() if message not in errors] == [], errors
    assert errors.count("error: ") == len(mistakes)
    assert "(rank 1)" not in errors  # the first rank alone reports what all ranks have
