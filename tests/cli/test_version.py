"""Versions as a bug report needs them."""

import platform

import torch
from command_line import call

import dinoseg


def test_version_is_printed_without_composing(tmp_path):
    done = call(tmp_path, "--version")
    assert done.status == 0 and not done.err and not list(tmp_path.iterdir())
    assert done.out.startswith(f"dinoseg {dinoseg.__version__}\ntorch {torch.__version__} (")
    assert "CUDA" in done.out and f"Python {platform.python_version()}" in done.out and "Hydra" not in done.out
