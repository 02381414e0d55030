"""Texts of errors are shown, not read: kinds of our own mistakes are classes with attributes."""

import ast
import pickle
from pathlib import Path

import pytest

import dinoseg
from dinoseg.utils.errors import KeyNotSet, UnknownKey, UnknownOption

PACKAGE = Path(dinoseg.__file__).parent
READERS = {  # functions that compare, replace or parse the text of an error, and whose it is
    "cli/typos.py _explain_launcher": "of a launcher, without its colours",
    "cli/typos.py _find_missing_package": "of Hydra, on a plug-in that is not installed",
    "config/nodes.py _call_target": "of Hydra, on a target and its arguments",
    "config/nodes.py _missing_key": "of OmegaConf",
    "utils/images.py _explain": "of Pillow, on an image beyond its limit",
    "data/loader.py wait_for_item": "of torch, on processes of a loader",
    "segmenter/hub.py _client_errors_as_user_errors": "of huggingface_hub and the network",
    "segmenter/load.py open_path": "ours: whether it names the file",
    "inference/memory.py is_shortage": "of torch and CUDA, on memory",
    "extensions/serving/decoding.py _send_error": "of any library: the path of an upload is removed",
    "utils/errors.py file_errors_as_user_errors": "of pathlib, on a home folder",
    "utils/errors.py name_parameters": "ours: the only place that puts keys into messages",
}
PARTS = {"endswith", "find", "index", "partition", "replace", "rpartition", "startswith"}
SEARCHES = {"findall", "finditer", "fullmatch", "match", "search", "sub"}


def is_text(node, errors, texts):
    """Return whether an expression is the text of one of these errors, or one of these variables that hold it."""
    if isinstance(node, ast.Name):
        return node.id in texts
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        inner = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        return node.func.id in ("str", "repr") and bool(inner & errors)
    if isinstance(node, ast.Attribute) and node.attr == "args":
        return getattr(node.value, "id", None) in errors
    if isinstance(node, ast.Call):
        return is_text(node.func, errors, texts)
    return isinstance(node, ast.Attribute | ast.Subscript) and is_text(node.value, errors, texts)


def reads_text(function):
    """Return whether a function compares, replaces or parses the text of an error that it catches or takes."""
    nodes = list(ast.walk(function))
    errors = {node.name for node in nodes if isinstance(node, ast.ExceptHandler)}
    errors |= {node.arg for node in nodes if isinstance(node, ast.arg) and node.arg.endswith("error")}
    texts = set()
    for node in nodes:
        if isinstance(node, ast.Assign) and is_text(node.value, errors, texts):
            texts |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    read = []
    for node in nodes:
        if isinstance(node, ast.Compare):
            read += [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            read += [node.func.value] if node.func.attr in PARTS else []
            read += node.args if node.func.attr in SEARCHES else []
    return any(is_text(node, errors, texts) for node in read)


def readers(file, source):
    """Return the functions of a file that read the text of an error."""
    functions = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef)]
    return {f"{file} {function.name}" for function in functions if reads_text(function)}


def test_only_listed_functions_read_texts_of_errors():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found |= readers(path.relative_to(PACKAGE).as_posix(), path.read_text("utf-8"))
    assert found == READERS.keys()


@pytest.mark.parametrize(
    "line",
    [
        'if "not set" in str(error): pass',
        "if str(error) != expected: pass",
        'if str(error).strip().startswith("No mode"): pass',
        'raise ValueError(str(error).replace("resume=", "init="))',
        'found = re.search("key", str(error))',
        'if error.args[0] == "no": pass',
        'message = str(error)\n        if message.partition("=")[0] in names: pass',
    ],
)
def test_a_planted_reader_is_found(line):
    assert readers("a.py", f"def f():\n    try: pass\n    except ValueError as error:\n        {line}")
    shown = "reason = str(error).splitlines()[0]\n        if error.key == 'a': raise ValueError(f'{error} {reason}')"
    assert not readers("a.py", f"def f():\n    try: pass\n    except ValueError as error:\n        {shown}")


@pytest.mark.parametrize(
    "error",
    [
        KeyNotSet("data.root is not set.", key="data.root"),
        UnknownKey("seeds is not a key.", key="seeds"),
        UnknownOption("head=liner is unknown.", group="head", option="liner"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_attributes_of_errors_reach_other_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
