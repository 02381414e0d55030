"""Programs that call the functions: scripts without `if __name__ == "__main__":`, ranks, notebooks and the README."""

import shlex
import signal
import subprocess
import sys
import time

import pytest
from command_line import SMALL, write_data
from docs_pages import OURS, ROOT, blocks, commands
from finished_runs import rows, train_run

from dinoseg.api import modes
from dinoseg.api.compose import compose, read_call, words_of
from dinoseg.config.plain import to_container
from dinoseg.training import checkpoint

PROCESSES = """
print("begins")
from dinoseg.extensions.auto.separate_process import run_in_process
from dinoseg.utils.workers import in_processes
print(run_in_process(abs, -3), sum(number for _, number in in_processes(abs, [-1] * 40, 2, remedy="")))
assert __file__ == "script.py" or __file__.endswith("/script.py")
"""
ON_RANKS = f"""
import dinoseg
print("begins", flush=True)
words = {[*SMALL, "engine.precision=fp32"]}
run = dinoseg.train(None, *words, mode={{"report": False, "metrics_only": True}}, out_dir="run", OPTIONS)
print("ends", run.step, run.scores["pixels"])
"""


def start(folder, script):
    (folder / "script.py").write_text(script)
    command = [sys.executable, "script.py"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def test_processes_do_not_import_the_script(tmp_path):
    assert finish(start(tmp_path, PROCESSES)) == "begins\n3 40\n"


@pytest.mark.heavy
def test_a_script_of_ranks_runs_once_and_gets_the_run(tmp_path):
    write_data(tmp_path / "data")
    out = finish(
        start(tmp_path, ON_RANKS.replace("OPTIONS", "trainer={'steps': 2, 'log_every': 1}, engine={'devices': 2}"))
    )
    assert out.count("begins") == 1 and "ends 2 3072" in out
    train_run(tmp_path, "alone", "mode=train", *SMALL, "engine.precision=fp32", "trainer.log_every=1")
    losses = [[row["train/loss"] for row in rows(tmp_path, run) if "train/loss" in row] for run in ("run", "alone")]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=2e-3)  # Adam scales rounding up


@pytest.mark.heavy
@pytest.mark.parametrize(("number", "devices"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_stopped_script_saves_and_ends(number, devices, tmp_path):
    write_data(tmp_path / "data")
    options = f"trainer={{'steps': 10**5, 'val_every': 10**5, 'save_every': 1}}, engine={{'devices': {devices}}}"
    process = start(tmp_path, ON_RANKS.replace("OPTIONS", options))
    last = tmp_path / "run/checkpoints/last.safetensors"
    while not last.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert "ends" not in out and checkpoint.describe(last)["progress"]["step"] > 0
    if number == signal.SIGTERM:
        assert process.returncode == -signal.SIGTERM, err
    else:
        assert process.returncode in (130, -signal.SIGINT) and "KeyboardInterrupt" in err, err
        assert "To resume, add resume=auto or resume=" in err


class Called(Exception):
    """Ends the README's Python at its first mode."""


@pytest.mark.slow
def test_both_ways_of_the_readme_to_train_have_the_same_config(monkeypatch):
    called = []

    def record(mode, words, overrides, out_dir, *_):
        called.append([f"mode={mode}", *words, *words_of(*read_call((), overrides)[:2])])
        raise Called(out_dir)

    monkeypatch.setattr(modes, "run_mode", record)
    code = next(text for _, text in blocks(ROOT / "README.md", "python") if "dinoseg.train(" in text)
    with pytest.raises(Called, match="^RUN$"):
        exec(compile(code, "README.md", "exec"), {})
    typed = next(line for line in commands(ROOT / "README.md") if "hydra.run.dir=RUN" in line)
    words = [word for word in shlex.split(typed.removeprefix(OURS)) if word != "hydra.run.dir=RUN"]
    ours, theirs = (to_container(compose(each)) for each in (called[0], words))
    assert ours == theirs and ours["trainer"]["steps"] == 2000


CELLS = (
    f"import dinoseg, random, logging, warnings\nwords = {[*SMALL]}\nrandom.seed(3)\nstate = random.getstate()",
    "run = dinoseg.train(None, *words, trainer={'steps': 2}, mode={'report': True})\nrun",
    "scores = dinoseg.evaluate(run, mode={'metrics_only': True})\nscores",
    "dinoseg.compare([run, scores])",
    "dinoseg.train('demoo')",
    """import os, signal, threading, time
def interrupt():
    while not os.path.exists("stopped/checkpoints/last.safetensors"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
dinoseg.train(None, *words, out_dir="stopped", trainer={"steps": 10**6, "val_every": 10**6, "save_every": 1})""",
    "run = dinoseg.Run('stopped').resume(trainer={'steps': dinoseg.Run('stopped').step + 1})\nprint('step', run.step)",
    "assert random.getstate() == state and not logging.getLogger().handlers\nrun.plot().savefig('curves.png')",
)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functions_run_in_a_notebook(tmp_path):
    """Results are HTML, interrupts are named, and state stays."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    write_data(tmp_path / "data")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    cells[4].metadata.tags = cells[5].metadata.tags = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [cell.outputs for cell in notebook.cells]

    def html(number):
        return next(each.data["text/html"] for each in outputs[number] if "text/html" in each.get("data", {}))

    def texts(number):
        return "".join(each.text for each in outputs[number] if each.output_type == "stream")

    assert "mIoU" in html(1) and "data:image/png;base64," in html(1)
    assert "<td>bright</td>" in html(2) and "no significant difference" in html(3)
    error, stop = outputs[4][-1], outputs[5][-1]
    assert error.ename == "UnknownOption" and "Did you mean hparam=demo" in error.evalue
    assert stop.ename == "KeyboardInterrupt" and "To resume, add resume=auto" in stop.evalue
    assert "step" in texts(6) and (tmp_path / "curves.png").is_file()
    assert "step 2 of 2" in texts(1) or "widget" in str(outputs[1])
