"""A sweep on a Ray cluster of two nodes, which `ray start` starts on this machine."""

import csv
import os
import secrets
import subprocess
import sys

import pytest
from command_line import SMALL, write_data
from daemons import run_daemon, wait_until

pytest.importorskip("ray", reason="needs ray and hydra-ray-launcher")
pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs hydra-ray-launcher")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(sys.platform != "linux", reason="the nodes have addresses that only Linux has"),
]
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1")
ALIVE = "import ray, sys; ray.init(sys.argv[1]); sys.exit(2 != sum(node['Alive'] for node in ray.nodes()))"


@pytest.fixture(scope="module")
def environment():
    """Return the environment of nodes and sweeps: only processes with its token may use the cluster."""
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    return os.environ | ours


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, environment):
    """Return the address of a cluster of two nodes with one processor each."""
    folder = tmp_path_factory.mktemp("ray")  # a short path: sockets lie below it
    head = [*RAY, "--head", "--port=0", "--node-ip-address=127.0.0.2", "--include-dashboard=false"]
    with run_daemon([*head, f"--temp-dir={folder}/ray"], folder / "head.log", environment) as first:
        address = folder / "ray/ray_current_cluster"
        wait_until(lambda: address.is_file() and address.read_text(), [first])
        node = [*RAY, f"--address={address.read_text()}", "--node-ip-address=127.0.0.3"]
        with run_daemon(node, folder / "node.log", environment) as second:
            check = [sys.executable, "-c", ALIVE, address.read_text()]
            both = [first, second]
            wait_until(lambda: not subprocess.run(check, env=environment, capture_output=True).returncode, both)
            yield address.read_text()


def test_a_sweep_on_two_nodes_has_a_complete_table(tmp_path, environment, cluster):
    write_data(tmp_path / "data")
    words = [f"hydra.launcher.ray.init.address={cluster}", "hydra.launcher.ray.remote={num_cpus:1}"]
    words += ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}_${oc.env:RAY_RAYLET_PID,none}"]
    command = [sys.executable, "-m", "dinoseg", "-m", "mode=train", *SMALL, "head=linear,mlp", "hydra/launcher=ray"]
    done = subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "sweep/sweep.csv", encoding="utf-8", newline="") as file:
        rows = {row["head"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"linear", "mlp"} and all(float(row["mIoU %"]) > 0 for row in rows.values())
    nodes = {folder.name.partition("_")[2] for folder in (tmp_path / "sweep").glob("[01]_*")}
    assert len(nodes) == 2 and "none" not in nodes  # each job ran below a daemon of its own
    print(done.stdout)
