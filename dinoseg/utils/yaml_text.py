"""Reading of untrusted YAML: bounded time and memory, plain values only."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from dinoseg.utils.forms import SchemaError, read_regular, refuse_surrogates

_DEEPEST = 32  # nesting levels
_LARGEST = 2**63 - 1  # largest integer; printing one of thousands of digits raises


def read_yaml(path: Path, most: int) -> Any:
    """Read the plain values in a YAML file of at most `most` bytes.

    Raises:
        OSError: if the file is missing or cannot be read.
        UserError: if it is no regular file, but a pipe, for example.
        SchemaError: if it is larger, or as `parse_yaml`.
    """
    try:
        return parse_yaml(read_regular(path, most).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SchemaError(f"byte {error.start} is not valid text: save it as UTF-8") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML text into plain values: no aliases, no tags, unique keys; dates stay text, as in Hydra.

    Raises:
        SchemaError: if it is no YAML, or holds anything else.
    """
    try:
        value = yaml.load(text, _Loader)
        refuse_surrogates(value)
        return value
    except SchemaError:
        raise
    except (yaml.YAMLError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise SchemaError(f"it is not plain YAML: {' '.join(str(error).split()) or type(error).__name__}") from None


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):  # ten lines of them can expand beyond any memory
            raise SchemaError("it has an alias (*name): write the value out")
        if (tag := getattr(self.peek_event(), "tag", None)) is not None:  # tag constructors may raise anything
            raise SchemaError(f"it has the tag {tag!r:.60}: write the value without it")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise SchemaError(f"it is nested deeper than {_DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise SchemaError("it has a merge key (<<): write the values out")
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            counts = Counter(self.construct_object(key) for key, _ in node.value)
            twice = ", ".join(f"{key}" for key, count in counts.items() if count > 1)
            raise SchemaError(f"{twice:.200} occurs more than once in one mapping: make each name unique")
        return mapping

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if type(value) is int and abs(value) > _LARGEST:
            raise SchemaError("it has a whole number of more than 64 bits")
        return value
