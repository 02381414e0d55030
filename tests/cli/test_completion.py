"""Tab completion suggests what a user may type."""

import subprocess

import pytest
from command_line import call


def suggest(tmp_path, monkeypatch, line):
    monkeypatch.setenv("COMP_LINE", line)
    done = call(tmp_path, "--shell-completion", "query=bash")
    assert done.status == 0, done.err
    return done.out.split()


@pytest.mark.parametrize("group", ["head", "backbone", "data"])
def test_completion_hides_options_that_only_config_files_read(tmp_path, monkeypatch, group):
    words = suggest(tmp_path, monkeypatch, f"dinoseg {group}=")
    assert len(words) > 3 and not [word for word in words if not word.startswith(f"{group}=") or "=_" in word]
    assert suggest(tmp_path, monkeypatch, f"dinoseg {group}=_") == []


def test_completion_suggests_modes_and_keys(tmp_path, monkeypatch):
    assert suggest(tmp_path, monkeypatch, "dinoseg mode=tr") == ["mode=track", "mode=train"]
    assert suggest(tmp_path, monkeypatch, "dinoseg mode=train trainer.st") == ["trainer.steps="]


def test_completion_script_is_that_of_the_shell(tmp_path):
    script = call(tmp_path, "--shell-completion", "install=bash").out
    assert "complete -o nospace" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
