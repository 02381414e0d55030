"""The functions in a real Jupyter kernel: results as HTML, interrupts, and state that stays."""

import pytest
from command_line import SMALL, write_data

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
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


def test_functions_run_in_a_notebook(tmp_path):
    write_data(tmp_path / "data")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    cells[4].metadata.tags = cells[5].metadata.tags = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    outputs = [cell.outputs for cell in notebook.cells]
    run, scores, comparison = (html(outputs[number]) for number in (1, 2, 3))
    assert "mIoU" in run and "data:image/png;base64," in run
    assert "<td>bright</td>" in scores and "no significant difference" in comparison
    error, stop = outputs[4][-1], outputs[5][-1]
    assert error.ename == "UserError" and "Did you mean hparam=demo" in error.evalue
    assert stop.ename == "KeyboardInterrupt" and "To resume, add resume=auto" in stop.evalue
    assert "step" in texts(outputs[6]) and (tmp_path / "curves.png").is_file()
    assert "step 2 of 2" in texts(outputs[1]) or "widget" in str(outputs[1])


def html(outputs):
    return next(each.data["text/html"] for each in outputs if "text/html" in each.get("data", {}))


def texts(outputs):
    return "".join(each.text for each in outputs if each.output_type == "stream")
