"""Launchers and sweepers that are not installed: which extra brings them."""

from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import SMALL, call, write_data

from dinoseg.cli.typos import explain_plugin_error

NO_LAUNCHER = RuntimeError("Unknown plugin class : 'hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher'")
NO_MODULE = ModuleNotFoundError("No module named 'optuna'\nmore")


@pytest.mark.parametrize(
    ("words", "error", "package"),
    [
        (["-m", "hydra/launcher=ray"], NO_LAUNCHER, "hydra-ray-launcher"),
        (["hydra/launcher=submitit_slurm"], NO_LAUNCHER, ".[submitit]"),
        (["mode=train", "hydra/sweeper=optuna", "a=1"], NO_MODULE, ".[optuna]"),
        (["hydra/launcher=ray"], RuntimeError("out of memory"), None),
        (["hydra/launcher=basic"], NO_LAUNCHER, None),
        (["mode=train", "data.root=hydra/launcher=ray"], NO_MODULE, None),
    ],
)
def test_missing_package_is_named_with_its_extra(words, error, package):
    said = explain_plugin_error(words, error)
    assert (f"pip install '{package}'" in said and "\n" not in said) if package else said == ""
    assert ("in your clone of dinoseg, pip" in said) == bool(package and package.startswith("."))


def test_config_file_of_each_plugin_names_its_extra():
    folder = Path(__file__).parents[2] / "dinoseg/cfg/hydra"
    options = [path for group in ("launcher", "sweeper") for path in (folder / group).glob("*.yaml")]
    assert len(options) == 5
    for path in options:
        said = explain_plugin_error([f"hydra/{path.parent.name}={path.stem}"], NO_MODULE)
        assert said.split("pip install ")[1].split(" (")[0].strip("'") in path.read_text()


def test_an_interval_that_nothing_searches_is_refused(tmp_path):
    done = call(tmp_path, "mode=train", *SMALL, "optim.optimizer.lr=interval(1e-4,1e-2)")
    assert done.status == 1 and done.err.startswith("error: optim.optimizer.lr=interval(1e-4,1e-2) gives several")
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_fails_is_one_message(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "bin").mkdir()
    for command in ("srun", "sbatch"):
        script = tmp_path / "bin" / command
        script.write_text("#!/bin/sh\necho 'sbatch: error: no such partition: gpu' >&2; exit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin")
    write_data(tmp_path / "data")
    done = call(tmp_path, "-m", "mode=train", *SMALL, "head=linear,mlp", "hydra/launcher=submitit_slurm")
    assert done.status == 1 and "Traceback" not in done.err
    (message,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "hydra/launcher=submitit_slurm failed" in message and "sbatch: error: no such partition: gpu" in message


@pytest.mark.heavy
def test_a_launcher_without_its_cluster_is_one_message(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    write_data(tmp_path / "data")
    with patch("submitit.AutoExecutor", side_effect=ConnectionError("no cluster\n\n  File x\nat 10.0.0.7")):
        done = call(tmp_path, "-m", "mode=train", *SMALL, "head=linear,mlp", "hydra/launcher=submitit_local")
    assert done.status == 1 and "Traceback" not in done.err
    assert "hydra/launcher=submitit_local failed (ConnectionError: no cluster ... at 10.0.0.7)" in done.err


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed here")
def test_a_launcher_that_is_not_installed_is_named(tmp_path):
    done = call(tmp_path, "-m", "mode=train", *SMALL, "head=linear,mlp", "hydra/launcher=ray")
    assert done.status == 1 and "Traceback" not in done.err
    assert done.err.startswith("error: hydra/launcher=ray needs a package that is not installed (")
