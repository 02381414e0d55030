"""Errors of the command line in the terms of Python calls."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dinoseg.cli.words import parse_word
from dinoseg.config.grammar import decode_keys
from dinoseg.utils.errors import UserError, reword

_TERMS = {  # in this order, longer ones first
    "Add `--cfg job` to see all keys, `--help` alone to see all groups and options.": "docs/config.md lists the keys.",
    "--config-dir FOLDER, or config_dir=FOLDER in Python": "config_dir=FOLDER",
    "--config-dir FOLDER": "config_dir=FOLDER",
    "hydra.run.dir": "out_dir",
    "Set it on the command line: ": "Set it: ",
    "add -m hydra/sweeper=optuna to search it, or list values": "call the function once for each value",
    "For a run with each of them, add -m": "For a run with each of them, write a loop",
    "the command line": "the call",
}
_VALUE = r"(?:\[(?:[^][]|\[[^][]*\])*\]|\$\{[^{}]*\}|[^\s,;()'\"{}]*[^\s,;:.?()'\"{}])"
_WORD = rf"((?:data(?:/\w+)+|[a-z]\w*(?:\.\w+)*))=({_VALUE})"
_WORDS = re.compile(rf"(?:python -m dinoseg )?(?<![\w.=/+~'\"&?-]){_WORD}(?: {_WORD})*")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")  # such as FOLDER, which the caller replaces


@contextmanager
def python_terms(arguments: Mapping[str, str] | None = None) -> Iterator[None]:
    """Replace terms of the command line in the message of a UserError, also `data.root=FOLDER` by `data={"root": ...}`.

    Args:
        arguments: from keys of the config to the arguments of the call that set them.
    """
    try:
        yield
    except UserError as error:
        message = str(reword(error, {**_TERMS, **(arguments or {})}))
        error.args = (_WORDS.sub(_as_arguments, message),)
        raise


def _as_arguments(words: re.Match[str]) -> str:
    """Return words of the command line as keyword arguments; a single plain word such as `head=mlp` is one already.

    The option of a nested group is a value of its table: `data/pixels=files` is `data={"pixels": "files"}`. Whole
    commands stay unchanged.
    """
    found = re.findall(_WORD, words[0])
    is_plain = len(found) == 1 and not re.search(r"[./].*=|=\[", words[0])
    if is_plain or words[0].startswith("python"):
        return words[0]
    arguments: dict[str, Any] = {}
    for key, text in found:
        *above, name = re.split("[./]", key)
        table = arguments
        for each in above:
            if not isinstance(table.get(each, {}), dict):  # an option and its keys: adapter=lora adapter.rank=4
                table[each] = {"name": table[each]}
            table = table.setdefault(each, {})
        table[name] = _parse_value(text)
    return ", ".join(f"{key}={_as_code(value)}" for key, value in arguments.items())


def _parse_value(text: str) -> Any:
    override = parse_word(f"key={text}")
    return text if override is None or override.is_sweep_override() else decode_keys(override.value())


def _as_code(value: Any) -> str:
    """Return a value as Python code, with placeholders such as FOLDER without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_as_code(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_code, value)) + "]"
    if isinstance(value, str) and not _PLACEHOLDER.fullmatch(value):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
