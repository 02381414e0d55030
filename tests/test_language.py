"""Texts that users read are in the standard words of the field (docs/glossary.md)."""

import ast
import re

import pytest
from docs_pages import ROOT

BANNED = re.compile(
    r"""\b(?:
    told|tells?|said|says?|asked|asks|kept|drawn|owed|owes|rests|learnt|mend(?:s|ed|ing)?|foretold|foretells?
    |go(?:es|ing)?\ on|went\ on|taken\ over|comes?\ of|came\ of|looked\ at|left\ over|beside|anew|likewise|nobody
    |whoever|in\ place\ of|(?:at|by|of)\ which|(?:is|be)\ had|(?:so|as)\ many|no\ such|none\ of|what\ (?:it|is|was)
    |held\ against|(?<!there\ )is\ no|the\ whole\ way|as\ (?:it|they)\ (?:come|comes|came|is|are)
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)


def messages(source):
    """Yield each string of several words in a Python source that is not a docstring, with {} for its values."""
    nodes = [*ast.walk(ast.parse(source))]
    strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    skipped = {id(part) for node in strings for part in node.values}  # parts of f-strings
    skipped |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    strings += [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for node in strings:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
        if id(node) not in skipped and text.count(" ") > 2:
            yield re.sub(r"\s+", " ", text)


def texts(path):
    """Return the texts of a file that users read."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [*messages(source)]
    if path.suffix == ".yaml":
        return [re.sub("`[^`]*`", "", line.partition("#")[2]) for line in source.splitlines()]
    if path.suffix == ".html":
        return re.split(r"<[^>]*>", source)
    return [text for text in re.findall(r"""["`](.*?)["`]""", source) if " " in text]  # of a script


FILES = sorted([path for ending in ("py", "yaml", "html", "js") for path in (ROOT / "dinoseg").rglob(f"*.{ending}")])


def test_user_texts_contain_no_banned_phrase():
    found = [(path, text) for path in FILES for text in texts(path)]
    wrong = [f"{path.relative_to(ROOT)}: {text}" for path, text in found if BANNED.search(text)]
    assert not wrong, "\n".join(wrong)
    assert len(found) > 4000


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('raise Error("the loss is told to the log")', True),
        ('raise Error(f"no model can be made of {config}, so the run goes "\n    f"on in place of {it}")', True),
        ('def f():\n    """Return what is kept."""', False),
        ('label = "goes on"', False),
    ],
)
def test_messages_are_strings_of_several_words_except_docstrings(source, wrong):
    assert any(BANNED.search(text) for text in messages(source)) == wrong
