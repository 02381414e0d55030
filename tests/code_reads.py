"""Which keys of the config the code of a mode can read, told from the source, without running it."""

import ast
import re
from functools import cache
from pathlib import Path

import dinoseg

PACKAGE = Path(dinoseg.__file__).parent
CONFIGS = ("cfg", "_cfg")  # what a config is called
BUILDERS = ("ModelBuilder", "Builder", "ModelSource")
BUILDER = ("value", "part", "settings", "digest", "arguments")  # methods of a builder that take full keys
WHOLE = ("part", "settings", "digest")  # those of them that read all that the node says
CALLED = {"builder", "_builder", "parts", "source"}  # what a builder is called; in its own modules also:
INSIDE = {"self", "each"}


class Code:
    """Functions and classes of the package by dotted name, and what names in each module stand for."""

    def __init__(self):
        self.parts, self.names, self.seen = {}, {}, {}
        for path in PACKAGE.rglob("*.py"):
            module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            own = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            aliases = [(node.module, alias) for node in imports for alias in node.names]
            self.names[module] = {each.asname or each.name: f"{source}.{each.name}" for source, each in aliases}
            self.names[module] |= {node.name: f"{module}.{node.name}" for node in own}
            constants = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
            for node in own:
                self.parts[f"{module}.{node.name}"] = module, node
            for node in constants:  # tables of functions and classes
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        self.names[module].setdefault(target.id, f"{module}.{target.id}")
                        self.parts.setdefault(f"{module}.{target.id}", (module, node))

    def reads(self, *starts):
        """Return the dotted keys, two names long at most, that functions and classes read, with all that they can call.

        Of a class that is reached, those methods are that any reached code names; of a builder, those that it names of
        what is called as builders are.
        """
        found = set()
        attributes = set()
        waiting = list(starts)
        reached = set()
        methods = []  # of reached classes: name, as it has to be named; module, node

        def is_named(method):
            return method[0] in attributes or method[0].split(".")[-1].startswith("__")

        while waiting or any(map(is_named, methods)):
            if waiting:
                part = waiting.pop()
                if part in reached or part not in self.parts:
                    continue
                reached.add(part)
                module, node = self.parts[part]
                if isinstance(node, ast.ClassDef):
                    inner = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                    owner = "builder." if node.name in BUILDERS else ""
                    methods += [(f"{owner}{each.name}", module, each) for each in inner]
                    pieces = [each for each in (*node.body, *node.bases) if each not in inner]
                else:
                    pieces = [node]
            else:
                called = next(filter(is_named, methods))
                methods.remove(called)
                _, module, node = called
                pieces = [node]
            for piece in pieces:
                names, named, keys = self.references_in(module, piece)
                waiting += names
                attributes |= named
                found |= keys
        return found

    def references_in(self, module, piece):
        """Return the parts, attributes and keys that a piece of code names."""
        if piece not in self.seen:
            known = self.names[module]
            inner = [*ast.walk(piece)]
            found = [each for each in inner if isinstance(each, ast.Attribute)]
            names = [known[each.id] for each in inner if isinstance(each, ast.Name) and each.id in known]
            names += [f"{known.get(each.value.id)}.{each.attr}" for each in found if isinstance(each.value, ast.Name)]
            inside = any(known.get(name, "").startswith(module) for name in BUILDERS)
            attributes = {each.attr for each in found}
            attributes |= {f"builder.{each.attr}" for each in found if is_builder(each.value, inside=inside)}
            self.seen[piece] = names, attributes, set(keys_in(piece))
        return self.seen[piece]


def is_builder(node, *, inside):
    """Return whether an expression is a builder, by what it is called."""
    if isinstance(node, ast.Call):
        makes = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        return makes in (*BUILDERS, "of", "with_changes", "with_options")
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
    return name in (CALLED | INSIDE if inside else CALLED)


def keys_in(node):
    """Yield the keys of `cfg.KEY`, `cfg.KEY.KEY`, `cfg["KEY"]` and `cfg.get("KEY")` in a piece of code.

    A key whose node is built ends with a star: that reads all that the node says.
    """
    inner, built = set(), set()
    for each in ast.walk(node):  # what holds others comes before them
        if isinstance(each, ast.Call) and path_of(each.func) in (["instantiate"], ["plain"]) and each.args:
            if path_of(each.func) == ["instantiate"] or each.keywords:  # plain(NODE, resolve=True)
                built.add(each.args[0])
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr in BUILDER:
            texts = [part.value for part in ast.walk(each) if isinstance(part, ast.Constant)]
            full = [text for text in texts if isinstance(text, str) and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", text)]
            whole = "*" * (each.func.attr in WHOLE)
            alone = is_builder(each.func.value, inside=False)
            yield from (".".join(text.split(".")[:2]) + whole for text in full if "." in text or whole or alone)
        path = path_of(each)
        if path is None or len(path) < 2 or path[0] not in CONFIGS or each in inner:
            continue
        inner |= set(ast.walk(each))
        yield ".".join(path[1:3]) + "*" * (each in built and len(path) <= 3)


def path_of(node):
    """Return the names of `a.b["c"].get("d")`; None of what is no such path."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        above = path_of(node.value)
        return [node.attr] if above in (None, ["self"]) else [*above, node.attr]
    key = None
    if isinstance(node, ast.Subscript):
        above = path_of(node.value)
        key = node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        above = path_of(node.func.value)
        key = node.args[0]
    if not isinstance(key, ast.Constant) or above is None:
        return None
    return [*above, str(key.value)]


@cache
def code():
    return Code()
