"""Reading of YAML from others: plain values with unique keys only."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from dinoseg.utils.forms import SchemaError, read_regular


def read_yaml(path: Path) -> Any:
    """Read the plain values in a YAML file.

    Raises:
        OSError: if the file is missing or cannot be read.
        UserError: if it is no regular file, but a pipe, for example.
        ValueError: if it is not UTF-8, or as `parse_yaml`.
    """
    return parse_yaml(read_regular(path).decode("utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """Parse YAML text into plain values: no aliases, unique keys; dates stay text, as in Hydra.

    Raises:
        SchemaError: if it is no YAML, or holds anything else.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # constructors of tags raise many exception types
        raise SchemaError(f"it is not plain YAML: {' '.join(str(error).split()) or type(error).__name__}") from None


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):  # ten lines of them can expand beyond any memory
            raise SchemaError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            counts = Counter(self.construct_object(key) for key, _ in node.value)
            twice = ", ".join(f"{key}" for key, count in counts.items() if count > 1)
            raise SchemaError(f"{twice:.200} occurs more than once in one mapping: make each name unique")
        return mapping
