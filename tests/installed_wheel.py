"""The built wheel, installed in an environment of its own, which sees the dependencies but not this checkout."""

import atexit
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@cache
def built_wheel():
    """Build the wheel once for all tests of a process, and return its path."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True, cwd=folder)
    if done.returncode and "poetry-core" in done.stderr:
        pytest.skip("no poetry-core can be had to build the wheel with")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("dinoseg-*.whl")
    return wheel


def install(folder):
    """Install the wheel below an empty folder, beside all packages that are here; return that environment's Python."""
    wheel = built_wheel()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", script], text=True).strip())
    into = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel]
    subprocess.run(into, check=True, capture_output=True)
    # linked one by one: a whole folder of them would bring packages that are not to be there, and this checkout
    for name in os.listdir(sysconfig.get_path("purelib")):
        package = name.partition("-")[0].partition(".")[0].lower()
        hidden = package == "dinoseg" or name.endswith(".pth")
        if not hidden and not (packages / name).exists():
            (packages / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    return python


def run(python, script, where):
    """Run a script in a folder with nothing of this process's environment but the system's, and return what it said."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE") if key in os.environ}
    done = subprocess.run([python, "-I", "-c", script], cwd=where, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
