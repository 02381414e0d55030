"""Two ranks, started by a Python script without `if __name__ == "__main__":`."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from command_line import SMALL, write_data

from dinoseg.training import checkpoint

pytestmark = pytest.mark.heavy
SCRIPT = f"""
import dinoseg
print("begins", flush=True)
words = {[*SMALL, "engine.precision=fp32"]}
run = dinoseg.train(None, *words, mode={{"report": False, "metrics_only": True}}, out_dir="OUT", STEPS)
print("ends", run.step, run.scores["pixels"])
"""


def start(folder, out, steps):
    (folder / f"{out}.py").write_text(SCRIPT.replace("OUT", out).replace("STEPS", steps))
    words = [sys.executable, f"{out}.py"]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_script_runs_once_and_gets_the_run(tmp_path):
    write_data(tmp_path / "data")
    process = start(tmp_path, "two", "trainer={'steps': 2}, engine={'devices': 2}")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and out.count("begins") == 1 and "ends 2 3072" in out, err
    words = [sys.executable, "-m", "dinoseg", "mode=train", *SMALL, "engine.devices=2", "engine.precision=fp32"]
    subprocess.run([*words, "hydra.run.dir=typed"], cwd=tmp_path, capture_output=True, check=True)
    ours, theirs = (
        checkpoint.read(tmp_path / name / "checkpoints/last.safetensors").tensors for name in ("two", "typed")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_ctrl_c_stops_all_ranks_and_raises_in_the_script(tmp_path):
    write_data(tmp_path / "data")
    process = start(
        tmp_path, "stopped", "trainer={'steps': 100_000, 'val_every': 100_000, 'save_every': 1}, engine={'devices': 2}"
    )
    last = tmp_path / "stopped/checkpoints/last.safetensors"
    while not last.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode in (130, -signal.SIGINT) and "KeyboardInterrupt" in err, err
    assert "To resume, add resume=auto or resume=" in err and "ends" not in out


def test_sigterm_saves_and_ends_the_script(tmp_path):
    write_data(tmp_path / "data")
    process = start(
        tmp_path, "ended", "trainer={'steps': 100_000, 'val_every': 100_000, 'save_every': 1}, engine={'devices': 1}"
    )
    last = tmp_path / "ended/checkpoints/last.safetensors"
    while not last.exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGTERM and "ends" not in out, err
    assert checkpoint.describe(last)["progress"]["step"] > 0
