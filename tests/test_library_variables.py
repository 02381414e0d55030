"""Variables that torch reads when it is imported: set by then, whatever imports it, unless the user sets them."""

import importlib
import json
import os
import subprocess
import sys

import pytest

import dinoseg

MODEL = "resume=dinoseg:surgery"
DATA = ("data=folder", "data.root=.", "data.classes=[a,b]")
COMMANDS = [
    ("mode=train", *DATA),
    ("mode=train", MODEL),
    ("mode=train", "resume=auto", *DATA),
    ("mode=eval", *DATA),
    *(
        (f"mode={mode}", *words, *more)
        for mode, words in {
            "eval": (),
            "predict": ("input=.",),
            "track": ("input=.",),
            "export": (),
            "serve": (),
            "app": (),
        }.items()
        for more in ((), (MODEL,))
    ),
]
CALLS = ["dinoseg.train", "dinoseg.create_model", "dinoseg.open_dataset", "dinoseg.load('dinoseg:surgery')"]
# each job runs in a fork, which ends when torch is to be imported
PRINT_AT_IMPORT = """
import json, os, sys
sys.path.insert(0, os.getcwd())
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("at import:", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
commands, calls = json.loads(sys.argv[1])
import dinoseg.__main__
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts each job by a fork")
@pytest.mark.parametrize(("given", "found"), [({}, dinoseg._SPINS), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_spin_limit_is_set_when_torch_is_imported(tmp_path, given, found):
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | given
    jobs = json.dumps([COMMANDS, CALLS]) if not given else json.dumps([[], CALLS])
    command = [sys.executable, "-c", PRINT_AT_IMPORT, jobs]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    printed = [line for line in done.stdout.splitlines() if line.startswith("at import:")]
    assert printed == [f"at import: {found}"] * sum(map(len, json.loads(jobs))), done.stderr


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
