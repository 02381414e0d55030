"""The core and the extensions of the package: which modules and config files belong to which, and who needs whom.

Whatever is not below `dinoseg/extensions` is the core, which imports no extension. `python tests/extensions.py` prints
the sizes of both, and `python tests/extensions.py NAME` the files to delete with an extension and those that need it.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dinoseg"
CONFIGS = PACKAGE / "cfg"
_CHECK = re.compile(r"_*(check|refuse|expect|require)(_|$)")  # not `checkpoint`; `validate` scores a split
_COLLECTING = {"append", "add", "extend", "update"}  # methods that change a local list or set
PLUGINS = ROOT / "hydra_plugins"  # of sweeps


@dataclass(frozen=True)
class Extension:
    """A capability that can be deleted: a package of its name below `dinoseg/extensions`, with the config files that
    name its classes and functions.

    Args:
        needs: extensions that it imports, which must stay with it.
        configs: config files without a `_target_` of it.
    """

    needs: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()


EXTENSIONS = {
    "annotations": Extension(),
    "auto": Extension(configs=("hparam/auto",)),
    "clips": Extension(("annotations", "video")),
    "compare": Extension(),
    "conversion": Extension(("annotations",)),
    "distillation": Extension(("feature_cache", "video")),
    "doctor": Extension(("idd", "video")),
    "ensembles": Extension(("thresholds",)),
    "example": Extension(("feature_views", "video")),
    "export": Extension(),
    "feature_cache": Extension(),
    "few_masks": Extension(("distillation",)),
    "feature_views": Extension(("video",)),
    "idd": Extension(),
    "loggers": Extension(),
    "objects": Extension(("annotations", "protocols")),
    "packed": Extension(),
    "prepare": Extension(("idd", "video")),
    "probe": Extension(),
    "protocols": Extension(),
    "query_heads": Extension(),
    "regions": Extension(),
    "rendering": Extension(),
    "serving": Extension(("annotations", "feature_views", "tracking", "video")),
    "slots": Extension(("clips", "protocols", "tracking", "video_scores")),
    "sweeps": Extension(("compare",), ("hydra/sweeper/optuna",)),
    "thresholds": Extension(),
    "tracking": Extension(("annotations", "clips", "video")),
    "tracks": Extension(("annotations", "objects", "protocols")),
    "video": Extension(),
    "video_scores": Extension(("annotations", "clips", "protocols", "tracking")),
}


@cache
def modules() -> dict[str, Path]:
    """Return the file of each module, by its name below dinoseg; that of the package itself is empty."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def extension_of(name: str) -> str | None:
    """Return the extension of a module; None: the core."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] or None if package == "extensions" else None


@cache
def tree(name: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def statements(name: str) -> int:
    """Return the number of statements of a module, docstrings apart."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = list(ast.walk(tree(name)))
    docs = sum(ast.get_docstring(node, clean=False) is not None for node in nodes if isinstance(node, owners))
    return sum(isinstance(node, ast.stmt) for node in nodes) - docs


@cache
def imports_of(name: str, *, lazy: bool = True) -> frozenset[str]:
    """Return the modules that a module imports; `lazy`: inside functions and for types only, too."""
    found = set()

    def visit(node: ast.AST, *, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not lazy:
                continue
            if lazy or not inside:
                found.update(_imported(child))
            visit(child, inside=inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree(name), inside=False)
    known = {each for each in found if each in modules() and each != name}
    # the package itself, whose name is empty, lists public names of extensions, which it imports on first access
    return frozenset(each for each in known if name or extension_of(each) is None)


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dinoseg":
        module = str(node.module).removeprefix("dinoseg").removeprefix(".")
        for alias in node.names:
            full = f"{module}.{alias.name}".lstrip(".")
            yield full if full in modules() else module
    elif isinstance(node, ast.Import):
        yield from (alias.name.removeprefix("dinoseg.") for alias in node.names if alias.name.startswith("dinoseg."))


def imported_with(start: str, *, lazy: bool = False) -> set[str]:
    """Return all modules that are imported with a module, itself included."""
    seen: set[str] = set()
    rest = [start]
    while rest:
        name = rest.pop()
        if name not in seen:
            seen.add(name)
            rest += imports_of(name, lazy=lazy)
    return seen


def edges_into_extensions() -> set[tuple[str, str]]:
    """Return each import of the core from an extension, and each name of a module of an extension in its strings."""
    core = [name for name in modules() if extension_of(name) is None]
    found = {(name, other) for name in core for other in imports_of(name) if extension_of(other)}
    for name in filter(None, core):
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("dinoseg."):
                target = _module_of(node.value)
                if target is not None and extension_of(target):
                    found.add((name, target))
    return found


def _module_of(target: str) -> str | None:
    """Return the module in the dotted name of a class or function of the package."""
    parts = target.removeprefix("dinoseg.").split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((name for name in names if name in modules()), None)


@cache
def config_files() -> dict[str, Path]:
    """Return the config files by name, such as `head/linear`."""
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}


@cache
def extensions_of_config(name: str) -> frozenset[str]:
    """Return the extensions of a config file: those of its targets, and of what its defaults list requires."""
    text = config_files()[name].read_text(encoding="utf-8")
    targets = re.findall(r"(?:_target_: *|dinoseg\.class_file:[\w.]+,)dinoseg\.([\w.]+)", text)
    found = {extension_of(_module_of(target) or "") for target in targets}
    found |= {key for key, extension in EXTENSIONS.items() if name in extension.configs}
    content = yaml.safe_load(text)
    for entry in (content.get("defaults") or ()) if isinstance(content, dict) else ():
        for file in _required_files(entry, name.rpartition("/")[0]):
            if file in config_files():
                found |= extensions_of_config(file)
    return frozenset(each for each in found if each is not None)


def _required_files(entry: object, group: str) -> Iterator[str]:
    """Yield the config files that an entry of a defaults list requires."""
    if isinstance(entry, str):
        path = entry.partition("@")[0]
        yield path.lstrip("/") if path.startswith("/") or not group else f"{group}/{path}"
        return
    assert isinstance(entry, dict)
    ((words, options),) = entry.items()
    *keywords, where = str(words).split()
    if "optional" in keywords:
        return
    path = where.partition("@")[0]
    folder = path.lstrip("/") if path.startswith("/") or not group or "override" in keywords else f"{group}/{path}"
    for option in options if isinstance(options, list) else [options]:
        yield f"{folder}/{option}"


def needed_by(name: str) -> set[str]:
    """Return an extension with all that need it: they go with it."""
    gone = {name}
    while more := {key for key, each in EXTENSIONS.items() if gone & {*each.needs}} - gone:
        gone |= more
    return gone


def copy_without(gone: set[str], folder: Path) -> None:
    """Copy the package to a folder, without the modules and config files of some extensions."""
    for package in (PACKAGE, PLUGINS):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    if "sweeps" in gone:
        # an empty module: without one, Python finds that of this repository, since all folders of the name count
        (folder / "hydra_plugins/dinoseg.py").write_text("")
    for name, path in modules().items():
        if extension_of(name) in gone:
            (folder / path.relative_to(ROOT)).unlink()
    for name, path in config_files().items():
        if extensions_of_config(name) & gone:
            (folder / path.relative_to(ROOT)).unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()  # a group without options is none


def guards(name: str) -> int:
    """Return the number of statements of a module that only guard.

    `CONTRIBUTING.md` has the rule: `raise` and `assert` with the `if` or handler around them, functions that are named
    as checks and their calls, and functions whose only effect is to raise.
    """
    found: set[int] = set()
    for node in ast.walk(tree(name)):
        match node:
            case ast.Raise() | ast.Assert():
                found.add(id(node))
            case ast.If(body=[*_, ast.Raise()]):
                found |= {id(node), *map(id, node.body)}
            case ast.ExceptHandler() if any(isinstance(each, ast.Raise) for each in node.body):
                found |= set(map(id, node.body))
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=called) | ast.Name(id=called))) if _CHECK.match(
                called
            ):
                found.add(id(node))
            case ast.FunctionDef() | ast.AsyncFunctionDef() if _CHECK.match(node.name) or _only_raises(node):
                found |= {id(each) for each in ast.walk(node) if isinstance(each, ast.stmt)}
    return sum(isinstance(node, ast.stmt) and id(node) in found for node in ast.walk(tree(name)))


def _only_raises(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function returns, yields and stores nothing, calls nothing for its effect, and may raise."""
    nodes = list(ast.walk(function))
    has_effect = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes)
    has_effect |= any(isinstance(node, ast.Return) and node.value is not None for node in nodes)
    has_effect |= any(
        isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store) for node in nodes
    )
    for node in nodes:
        match node:
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=called) | ast.Name(id=called))):
                has_effect |= _CHECK.match(called) is None and called not in _COLLECTING
    return not has_effect and any(isinstance(node, ast.Raise) for node in nodes)


def _print_sizes() -> None:
    sizes: dict[str, list[int]] = {}
    for name in modules():
        sizes.setdefault(extension_of(name) or "core", []).append(statements(name))
    for key, each in sorted(sizes.items(), key=lambda item: -sum(item[1])):
        print(f"{key:14} {sum(each):6} statements in {sum(size > 0 for size in each)} files")
    for mode in ("train", "predict"):
        found = imported_with(f"modes.{mode}")
        count = sum(map(statements, found))
        print(f"modes/{mode}.py imports {count} statements in {sum(statements(each) > 0 for each in found)} files")
    core = [name for name in modules() if extension_of(name) is None]
    share = 100 * sum(map(guards, core)) / sum(map(statements, core))
    print(f"guards in the core: {share:.1f} % of the statements")
    edges = edges_into_extensions()
    print(f"imports from the core into extensions: {len(edges)}")
    if "--list" in sys.argv:
        for name, other in sorted(edges):
            print(f"  {name} -> {other} ({extension_of(other)})")


def files_of(names: set[str]) -> list[str]:
    """Return the folders and config files to delete with some extensions, from the project's root on."""
    folders = [f"{place}/extensions/{name}" for name in sorted(names) for place in ("dinoseg", "tests")]
    configs = [path for name, path in config_files().items() if extensions_of_config(name) & names]
    return folders + [path.relative_to(ROOT).as_posix() for path in configs]


if __name__ == "__main__":
    if named := {*sys.argv[1:]} & EXTENSIONS.keys():
        print("\n".join(files_of(set.union(*map(needed_by, named)))))
    else:
        _print_sizes()
