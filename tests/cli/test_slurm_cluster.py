"""Trainings and a sweep on a Slurm cluster of one node, whose daemons run on this machine."""

import csv
import getpass
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from command_line import SMALL, write_data
from daemons import run_daemon, wait_until

from dinoseg.training.checkpoint import describe

DAEMONS = ("munged", "slurmctld", "slurmd")
FOUND = {name: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") for name in DAEMONS}
MISSING = [name for name, path in FOUND.items() if path is None]
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not found: apt-get install slurm-wlm munge"),
]
CONFIG = """
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=1800
MinJobAge=86400
NodeName={node} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""
LONG = ("trainer.steps=1000000", "trainer.save_every=5", "trainer.val_every=1000000", "resume=auto")


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Start the daemons, and return the environment in which Slurm's commands reach them."""
    folder = tmp_path_factory.mktemp("slurm")
    node = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, node=node, ports=free_ports(2), user=getpass.getuser()))
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    ours["SLURM_CONF"] = str(config)
    paths = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "key-file", "pid-file")]
    paths += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as stack:
        daemons = []
        for command in (
            [FOUND["munged"], "--foreground", "--force", *paths],
            [FOUND["slurmctld"], "-D"],
            [FOUND["slurmd"], "-D", "-N", node],
        ):
            daemon = run_daemon(command, folder / f"{Path(command[0]).name}.out", ours)
            daemons.append(stack.enter_context(daemon))
            if len(daemons) == 1:
                wait_until((folder / "munge.socket").exists, daemons)
        wait_until(lambda: slurm(ours, "sinfo", "-h", "-o", "%T") == "idle", daemons)
        yield ours


def slurm(environment, *command, cwd=None):
    """Return what a command of Slurm prints; "" if the controller does not answer yet."""
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path


def submit(environment, folder, options, words):
    """Submit the script of the documentation, and return the number of the job."""
    train = shlex.join([sys.executable, "-m", "dinoseg", "mode=train", *SMALL, *words])
    script = f"#!/bin/bash\n#SBATCH {options} --output=job.log --open-mode=append --requeue\nsrun {train}\n"
    (folder / "job.sh").write_text(script)
    return slurm(environment, "sbatch", "--parsable", "job.sh", cwd=folder)


def state_of(environment, job):
    return slurm(environment, "squeue", "-h", "-t", "all", "-o", "%T", "-j", job)


def last_steps(folder):
    """Return the step of each run's last checkpoint."""
    return [describe(path)["progress"]["step"] for path in sorted(folder.glob("outputs/*/*/checkpoints/last.*"))]


def run_dinoseg(environment, folder, *words, start=()):
    command = [*start, sys.executable, "-m", "dinoseg", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout)
    return done


def test_tasks_of_srun_are_ranks(environment, folder):
    words = ("mode=train", *SMALL, "hydra.run.dir=run")
    done = run_dinoseg(environment, folder, *words, start=("srun", "--ntasks=2"))
    assert done.returncode == 0, done.stderr
    assert describe(folder / "run/checkpoints/last.safetensors")["progress"]["step"] == 2
    assert re.search(r"2 (ranks|devices|processes)|devices: +2", done.stderr + done.stdout), done.stderr


def test_a_sweep_of_slurm_jobs_has_a_complete_table(environment, folder):
    launcher = {"gpus_per_node": "null", "cpus_per_task": 1, "timeout_min": 600}
    words = [f"hydra.launcher.{key}={value}" for key, value in launcher.items()]
    words += ["head=linear,mlp", "hydra/launcher=submitit_slurm", "hydra.sweep.dir=sweep"]
    done = run_dinoseg(environment, folder, "-m", "mode=train", *SMALL, *words)
    assert done.returncode == 0, done.stderr
    with open(folder / "sweep/sweep.csv", encoding="utf-8", newline="") as file:
        rows = {row["head"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"linear", "mlp"} and all(float(row["mIoU %"]) > 0 for row in rows.values())


def test_the_signal_before_the_time_limit_saves_the_run(environment, folder):
    """The limit is set once the run has saved, however long it takes to start."""
    start = time.monotonic()
    job = submit(environment, folder, "--ntasks=1 --time=600 --signal=TERM@30", LONG)
    wait_until(lambda: last_steps(folder))
    minutes = int(time.monotonic() - start) // 60 + 3  # at least two more than the job has run
    slurm(environment, "scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_until(lambda: state_of(environment, job) in ("COMPLETED", "FAILED", "TIMEOUT"))
    log = (folder / "job.log").read_text()
    (step,) = last_steps(folder)
    print(log)
    assert f"holds step {step}. To resume" in log and "TIME LIMIT" not in log


def test_a_requeued_job_resumes_its_run(environment, folder):
    words = (*LONG, "hydra.run.dir=outputs/base/mine")
    job = submit(environment, folder, "--ntasks=2 --time=600 --signal=TERM@30", words)
    wait_until(lambda: last_steps(folder))
    slurm(environment, "scontrol", "requeue", job)
    resumed = wait_until(lambda: re.search(r"resuming .* at step (\d+) of", (folder / "job.log").read_text()))
    wait_until(lambda: last_steps(folder)[0] > int(resumed[1]))
    slurm(environment, "scancel", job)
    wait_until(lambda: state_of(environment, job) == "CANCELLED")
    log = (folder / "job.log").read_text()
    print(log)
    assert int(resumed[1]) > 0 and len([*folder.glob("outputs/base/*")]) == 1
