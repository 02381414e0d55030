"""Scripts without `if __name__ == "__main__":`, and programs of Hydra, that call the functions."""

import subprocess
import sys

import pytest
from command_line import SMALL, write_data

PROCESSES = """
print("begins")
from dinoseg.utils.workers import run_in_process, in_processes
print(run_in_process(abs, -3), sum(number for _, number in in_processes(abs, [-1] * 40, 2, remedy="")))
assert __file__ == "script.py" or __file__.endswith("/script.py")
"""
OF_HYDRA = f"""
import logging, hydra, dinoseg
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
OmegaConf.register_new_resolver("len", lambda values: "of this program")
@hydra.main(version_base="1.1", config_path=None)
def main(cfg):
    folder = HydraConfig.get().runtime.output_dir
    run = dinoseg.train(None, *{[*SMALL]}, data={{"root": "PLACE"}}, mode={{"report": False, "metrics_only": True}})
    assert HydraConfig.get().runtime.output_dir == folder and HydraConfig.get().overrides.task == ["+lr=2"]
    logging.getLogger("of_the_program").info("trained %s, len is %s", run.step, OmegaConf.create("x: ${{len:[1]}}").x)
main()
"""


def ran(folder, script, *words):
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_do_not_import_the_script(tmp_path):
    assert ran(tmp_path, PROCESSES) == "begins\n3 40\n"


@pytest.mark.heavy
def test_a_program_of_hydra_trains_and_still_logs(tmp_path):
    write_data(tmp_path / "data")
    out = ran(tmp_path, OF_HYDRA.replace("PLACE", str(tmp_path / "data")), "+lr=2")
    logs = [*tmp_path.glob("outputs/20*/*/script.log")]
    assert len(logs) == 1 and "trained 2, len is of this program" in logs[0].read_text() and "trained 2" in out
