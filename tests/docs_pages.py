"""What the README and the docs hold: their pages, commands and Python, in the order of reading."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOG = sorted((ROOT / "docs/log").glob("*.md"))  # records, whose commands are of the versions that they name
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {*LOG})]
OURS = "python -m dinoseg "


def join_lines(block):
    """Return the lines of a block, those that a backslash continues as one."""
    return re.sub(r" \\\n +", " ", block).splitlines()


def blocks(page, languages="bash|python"):
    """Return (language, text) of each block of code of a page, or of a part of one, given as text."""
    text = page.read_text() if isinstance(page, Path) else page
    return re.findall(rf"^ *```({languages})\n(.*?)^ *```", text, flags=re.S | re.M)


def commands(page):
    """Return the commands of a page, or of a part of one: each line of its bash blocks, continuation lines joined."""
    lines = [line.strip() for _, block in blocks(page, "bash") for line in join_lines(block)]
    return [line for line in lines if line and not line.startswith("#")]


def kind_of(command):
    """Return what a training is apart from its numbers and its model: of these tests/test_matrix.py trains all."""
    words = [re.sub(r"\s", "", word) for word in shlex.split(command.removeprefix(OURS))]
    aside = re.compile(
        r"[^=]+=[\[\]\d.,e+-]+$|(adapter|head|loss|\+?backbone[.\w]*|loss\.weights)=|-m$|resume=auto$|hydra\.run\.dir="
    )
    return " ".join(sorted(word for word in words if not aside.match(word)))
