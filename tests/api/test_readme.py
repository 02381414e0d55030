"""The README's training in Python is that of its command line: test_modes.py shows that equal configs train alike."""

import shlex

import pytest
from docs_pages import OURS, ROOT, blocks, commands

from dinoseg.api import modes
from dinoseg.api.compose import compose, words_of
from dinoseg.config.plain import to_container

pytestmark = pytest.mark.slow


class Called(Exception):
    """Ends the README's Python at its first mode."""


def test_both_ways_to_train_have_the_same_config(monkeypatch):
    called = []

    def record(mode, words, overrides, out_dir, *_):
        called.append([f"mode={mode}", *words, *words_of(overrides)])
        raise Called(out_dir)

    monkeypatch.setattr(modes, "run_mode", record)
    code = next(text for _, text in blocks(ROOT / "README.md", "python") if "dinoseg.train(" in text)
    with pytest.raises(Called, match="^RUN$"):
        exec(compile(code, "README.md", "exec"), {})
    typed = next(line for line in commands(ROOT / "README.md") if "hydra.run.dir=RUN" in line)
    words = [word for word in shlex.split(typed.removeprefix(OURS)) if word != "hydra.run.dir=RUN"]
    ours, theirs = (to_container(compose(each)) for each in (called[0], words))
    assert ours == theirs and ours["trainer"]["steps"] == 2000
