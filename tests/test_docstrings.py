"""Sections of docstrings name what exists: parameters, fields, and classes of errors."""

import ast
import builtins
import re

import pytest
from docs_pages import ROOT

TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "dinoseg").rglob("*.py"))}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def section(node, title):
    """Return the names that a section of a docstring describes."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\S[^:]*):", found[1], re.MULTILINE) if found else ()
    return [name.strip("*`") for entry in entries for name in re.split(", | and ", entry)]


def parameters(function):
    """Return the names of a function's parameters."""
    given = function.args
    listed = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in listed if argument}


def fields(node, classes):
    """Return the fields and members of a class, the parameters with which it is made and called, and those of bases."""
    names = set()
    for each in node.body:
        targets = getattr(each, "targets", [getattr(each, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        names |= {each.name} if isinstance(each, FUNCTIONS) else set()
        is_made = isinstance(each, FUNCTIONS) and each.name in ("__init__", "__call__", "forward")
        names |= parameters(each) if is_made else set()
        stored = (inner for inner in ast.walk(each) if isinstance(inner, ast.Attribute))
        names |= {inner.attr for inner in stored if isinstance(inner.ctx, ast.Store)}
    above = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    return names.union(*(fields(base, classes) for base in above if base is not node))


def documented(tree):
    """Return the functions and classes of a file."""
    return [node for node in ast.walk(tree) if isinstance(node, (*FUNCTIONS, ast.ClassDef))]


def classes_of(trees):
    """Return the classes of some files by their names."""
    return {node.name: node for tree in trees for node in documented(tree) if isinstance(node, ast.ClassDef)}


def mistakes(tree, classes):
    """Yield the names in sections of a file's docstrings that do not exist."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    # a function also names errors of what it calls, whose classes its file need not import
    errors = {*dir(builtins), *imported, *classes}
    for node in documented(tree):
        known = fields(node, classes) if isinstance(node, ast.ClassDef) else parameters(node)
        described = [*section(node, "Args"), *section(node, "Attributes")]
        yield from (f"{node.name}: {name}" for name in described if name not in known)
        yield from (f"{node.name}: {name}" for name in section(node, "Raises") if name.split(".")[0] not in errors)


def test_docstrings_name_existing_parameters_and_errors():
    classes = classes_of(TREES.values())
    wrong = [f"{path.relative_to(ROOT)} {each}" for path, tree in TREES.items() for each in mistakes(tree, classes)]
    assert not wrong, "\n".join(wrong)
    nodes = [node for tree in TREES.values() for node in documented(tree)]
    assert sum(len(section(node, "Raises")) for node in nodes) > 600
    assert sum(len(section(node, "Args")) for node in nodes) > 1000


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("Args:\n        size: a.\n        *others: b.", []),
        ("Args:\n        sizes: a.", ["crop: sizes"]),
        ("Args:\n        size: a\n            of: b.", []),
        ("Raises:\n        ValueError: a.\n        torch.OutOfMemoryError: b.", []),
        ("Raises:\n        CropError: a.", ["crop: CropError"]),
    ],
)
def test_a_planted_name_is_found(section, wrong):
    source = f'import torch\n\ndef crop(size, *others):\n    """Crop.\n\n    {section}\n    """'
    assert [*mistakes(ast.parse(source), {})] == wrong
