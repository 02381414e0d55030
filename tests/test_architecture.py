"""Who may import whom, which door leads to which heavy dependency, and how large files and functions get."""

import ast
import gc
import re
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dinoseg

PACKAGE = Path(dinoseg.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}

LEVELS = (  # a package imports its own level and those below; no package of the core imports extensions
    ("__init__",),
    ("utils",),
    ("core",),
    ("models", "losses", "report"),
    ("data",),
    ("metrics", "config", "inference"),
    ("training", "runs"),
    ("experiment",),
    ("checkpoints",),
    ("evaluation", "segmenter", "testing"),
    ("methods",),
    ("modes", "cli"),
    ("api",),
    ("__main__", "extensions"),
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
LEAVES = (  # none imports another
    *("models/backbones", "models/heads", "losses", "metrics", "data"),
    *("extensions/query_heads", "extensions/slots/head", "extensions/slots/losses"),
    *("extensions/rendering/moving", "extensions/rendering/surgery"),
)
SHARED = (  # what leaves may import
    *("extensions/annotations", "data/label_tables", "models/heads/semantic"),
    *("extensions/rendering/canvas", "extensions/rendering/noise", "extensions/rendering/relief"),
    *("extensions/rendering/rendering", "extensions/slots/contract"),
)
BUILDERS = ("experiment/builder.py", "experiment/models.py")  # they reach leaves through _target_ only
WITH_CONFIG = (  # the config ends at their edge
    *("config", "experiment", "runs", "checkpoints", "modes", "cli", "api", "__main__"),
    *(file.removesuffix(".py") for file in FILES if file.endswith("_mode.py")),
    *("extensions/auto/choose", "extensions/auto/recipe", "extensions/protocols/score_classes"),
    *("extensions/sweeps/search", "extensions/sweeps/table"),
)
TRACKERS = (  # siblings: none imports another
    *("extensions/tracking/propagation", "extensions/tracking/smoothing", "extensions/slots/tracker"),
)
DOORS = {  # dependency -> the packages and files that may import it
    "hydra": WITH_CONFIG,
    "omegaconf": WITH_CONFIG,
    "hydra.utils": ("config/nodes",),
    "accelerate": ("training/engine",),
    "peft": ("models/adapters",),
    "bitsandbytes": ("models/adapters",),
    "transformers": ("models/backbones", "models/heads/upernet"),
    "scipy": (
        *("losses", "metrics", "evaluation/scoring/intervals"),
        *("extensions/protocols/clustering", "extensions/objects/joining", "extensions/tracking/grid/assignment"),
        *("extensions/example/insid3", "extensions/tracks/hota"),
    ),
    "tqdm": ("report/progress", "training/meter"),  # one bar, which a pipe can read too
    "timm": ("models/backbones",),
    "tensorboard": ("report/loggers/tensorboard",),
    "torch.utils.tensorboard": ("report/loggers/tensorboard",),
    "wandb": ("extensions/loggers/wandb",),
    "mlflow": ("extensions/loggers/mlflow",),
    "onnx": ("extensions/export",),
    "onnxscript": ("extensions/export",),
    "onnxruntime": ("extensions/export",),
    "huggingface_hub": ("models/backbones", "segmenter"),
    "nicegui": (
        *("extensions/serving/app", "extensions/serving/features_tab", "extensions/serving/page"),
        *("extensions/serving/sockets", "extensions/serving/widgets"),
    ),
    "fastapi": ("extensions/serving",),
    "starlette": ("extensions/serving",),
    "uvicorn": ("extensions/serving",),
    "optuna": ("extensions/sweeps/search",),
    "jinja2": ("report/html/page", "segmenter/hub"),
    "av": ("extensions/video/decoder", "extensions/video/writer"),
}
EXCEPTIONS = {
    ("__main__.py", "dinoseg.modes.help.help_for"),  # printed before hydra and torch are imported
    # public names, which editors see and which are imported on first access
    *(("__init__.py", f"{module}.{name}") for module, names in dinoseg._MODULES.items() for name in names),
    *(("__init__.py", f"dinoseg.{package}") for package in dinoseg._PACKAGES),
}
ASK_OTHERS = (  # files that use hasattr, on objects of other libraries, of users or of the operating system
    "api/objects",
    "core/metric",
    "core/shapes",
    "runs/log_file",
    "segmenter/inputs",
    "models/backbones",
    "utils/precision",
)
WITHOUT_KEYS = (  # messages name parameters; whoever instantiates a config node puts the key in front
    *(
        "models",
        "losses",
        "metrics",
        "extensions/clips/cut",
        "extensions/clips/view",
        "data/opened",
        "extensions/packed",
    ),
    *("data/photometric", "data/splits", "data/transforms"),
)
PICKLE_COLLECTIVES = {  # of torch and accelerate: a rank runs whatever code another one sends
    *("gather_object", "all_gather_object", "scatter_object_list", "broadcast_object_list"),
    *("send_object_list", "recv_object_list"),
}
LONGEST_FILE, LONGEST_FUNCTION = 500, 80
LARGEST_PACKAGE = 0.18  # of the lines: above it a package is two


@pytest.fixture(scope="module", autouse=True)
def parsed_files():
    """Parse each file once; garbage collection would visit the half a million nodes again and again."""
    gc.disable()
    for source in FILES.values():
        nodes(source)
    gc.enable()
    yield
    nodes.cache_clear()


@cache
def nodes(source):
    """Return all nodes of a source file, parsed once for all tests."""
    return tuple(ast.walk(ast.parse(source)))


@cache
def find_imports(source):
    """Return (line, full dotted name) of everything imported anywhere in a file, and `.` for a relative import."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." if node.level else node.module
            found += [(node.lineno, f"{start}.{alias.name}") for alias in node.names]
    return found


def import_violations(file, source):
    """Return what a file of the package imports against the rules, one line each."""
    found = []
    for line, name in find_imports(source):
        if (file, name) in EXCEPTIONS:
            continue
        if name.startswith(".") or name.endswith(".*"):
            found.append(f"{file}:{line}: {name}: import absolutely, and by name")
        elif name == "dinoseg" or name.startswith("dinoseg."):
            found += [f"{file}:{line}: {rule}" for rule in broken_rules(file, "/".join(name.split(".")[1:]))]
        for door, places in DOORS.items():
            if f"{name}.".startswith(f"{door}.") and not below(file, places):
                found.append(f"{file}:{line}: only {', '.join(places)} may import {door}")
    return found


def below(path, places):
    """Return the place, a package or a module, in which a path lies, or None."""
    return next((place for place in places if f"{path.removesuffix('.py')}/".startswith(f"{place}/")), None)


def top_level(path):
    return path.split("/")[0].removesuffix(".py")


def broken_rules(file, imported):
    """Yield the rules that are broken where a file imports a module or a name in it, given as a path."""
    own = top_level(file)
    other = top_level(imported) if top_level(imported) in LEVEL else "__init__"
    if LEVEL[other] > LEVEL[own]:
        yield f"{own} (level {LEVEL[own]}) imports {other} (level {LEVEL[other]})"
    leaf, others = below(file, LEAVES), below(imported, LEAVES)
    known = others == leaf or other in ("utils", "core", "report", "__init__") or below(imported, SHARED)
    if leaf and not known:
        yield f"{leaf} imports {others or other}: leaves know nothing of one another, nor of what is made of them"
    if file in BUILDERS and others and not below(imported, ("data/classes",)):  # names and colours, no dataset
        yield f"{file} imports {others}: it names leaves through _target_ only"
    if other == "modes" and own in ("cli", "api", "__main__"):
        yield f"{own} imports {other}: modes are reached through _target_ only"
    tracker, other_tracker = below(file, TRACKERS), below(imported, TRACKERS)
    if tracker and other_tracker and tracker != other_tracker:
        yield f"{tracker} imports {other_tracker}: trackers are siblings"


def circles(files):
    """Return a circle of imports between files, one between subpackages, and one between packages of the top level."""
    find = file_of(files)
    by_file = {}
    for file, source in files.items():
        by_file[file] = {other for _, name in find_imports(source) if (other := find(name))}
    graphs = (by_file, join_graph(by_file, package_of), join_graph(by_file, top_level))
    return sorted({*map(find_circle, graphs)} - {""})


def join_graph(graph, group):
    """Return a graph of imports between groups of files; what a group imports of itself does not count."""
    whole = {}
    for file, others in graph.items():
        whole.setdefault(group(file), set()).update(group(other) for other in others)
    return {name: others - {name} for name, others in whole.items()}


def package_of(file):
    """Return the subpackage that a file is in, else the file itself."""
    parts = file.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else file


def file_of(files):
    """Return the function from an imported name to the file of the package that it is of, None for another's."""

    def find(name):
        parts = name.split(".")[1:] if name.startswith("dinoseg.") else []
        paths = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        places = [f"{path}{end}" for path in paths for end in (".py", "/__init__.py")]
        return next((place for place in places if place in files), None)

    return find


def find_circle(graph):
    """Return the nodes of a circle in a graph, as one text; "" if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " - ".join(sorted({*error.args[1]}))
    return ""


def large_packages(files):
    """Return the packages, and the extensions, that hold more than their share of the lines."""
    lines = Counter()
    for file, source in files.items():
        package = package_of(file) if top_level(file) == "extensions" else top_level(file)
        lines[package] += len(source.splitlines())
    shares = {package: count / lines.total() for package, count in lines.items()}
    return [f"{package}: {share:.1%} of the lines" for package, share in shares.items() if share > LARGEST_PACKAGE]


def size_violations(file, source):
    """Return the file and the functions of it that are too long; comments of their own lines do not count there."""
    lines = source.splitlines()
    found = [f"{file}: {len(lines)} lines"] if len(lines) > LONGEST_FILE else []
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = sum(not line.lstrip().startswith("#") for line in lines[node.lineno - 1 : node.end_lineno])
            found += [f"{file}: {node.name} has {length} lines"] if length > LONGEST_FUNCTION else []
    return found


def test_imports_go_down_and_through_their_doors():
    imports = sum(len(find_imports(source)) for source in FILES.values())
    assert len(FILES) == len(list(PACKAGE.glob("**/*.py"))) >= 50 and imports > 5 * len(FILES)
    violations = [line for file, source in FILES.items() for line in import_violations(file, source)]
    assert not violations, "\n".join(violations)


def test_every_package_has_its_level():
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert packages == LEVEL.keys()
    assert all(
        any((PACKAGE / f"{place}{end}").exists() for end in ("", ".py"))
        for at in (*DOORS.values(), TRACKERS, LEAVES, SHARED, WITHOUT_KEYS)
        for place in at
    )


def keys_in_text(source):
    """Return the config keys, such as data.root, in the texts of a file; docstrings may show code."""
    groups = [*(path.name for path in (PACKAGE / "cfg").iterdir() if path.is_dir()), "resolution", "features"]
    key = re.compile(rf"(?<![\w./])(?:{'|'.join(groups)})\.[a-z_]+")
    alone = {id(node.value) for node in nodes(source) if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes(source) if isinstance(node, ast.Constant) and id(node) not in alone]
    return [found for text in texts if isinstance(text, str) for found in key.findall(text)]


def test_parts_name_parameters_instead_of_keys():
    found = {file: keys_in_text(source) for file, source in FILES.items() if below(file, WITHOUT_KEYS)}
    assert len(found) > 60 and not {file: keys for file, keys in found.items() if keys}
    planted = 'raise ValueError(f"data.augment.scale={scale}: set resolution.crop")'
    assert keys_in_text(planted) == ["data.augment", "resolution.crop"]


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("models/heads/cnn.py", "from dinoseg.losses.cross_entropy import CrossEntropy", "leaves know nothing"),
        ("models/heads/cnn.py", "from dinoseg.models.backbones import cut", "leaves know nothing"),
        ("data/voc.py", "import dinoseg.models.backbones.transformers_vit", "leaves know nothing"),
        ("metrics/iou.py", "from dinoseg.models.model import SegmentationModel", "leaves know nothing"),
        ("metrics/iou.py", "from dinoseg.data.formats import folder", "leaves know nothing"),
        ("report/html.py", "from dinoseg.metrics.confusion import Confusion", "report (level 3) imports metrics"),
        ("training/trainer.py", "def f():\n    from dinoseg.experiment import a", "training (level 6) imports experi"),
        ("experiment/builder.py", "from dinoseg.models import heads", "through _target_ only"),
        ("cli/launch.py", "from dinoseg.modes import train", "through _target_ only"),
        ("training/trainer.py", "import hydra.core.hydra_config", "may import hydra"),
        ("modes/train.py", "from hydra import utils", "may import hydra.utils"),
        ("training/trainer.py", "if True:\n    from accelerate import Accelerator", "may import accelerate"),
        ("models/heads/cnn.py", "import peft.tuners as tuners", "may import peft"),
        (
            "extensions/slots/tracker/propagation.py",
            "from dinoseg.extensions.tracking import smoothing",
            "trackers are siblings",
        ),
        ("models/heads/cnn.py", "from .linear import LinearHead", "absolutely"),
        ("models/heads/cnn.py", "from dinoseg.core.geometry import *", "by name"),
    ],
)
def test_a_planted_violation_is_found(file, source, message):
    assert any(message in found for found in import_violations(file, source)), import_violations(file, source)


def test_no_import_leads_back():
    assert not circles(FILES), "\n".join(circles(FILES))
    down, up = "from dinoseg.extensions.tracking.tracker import VideoTracker", "from dinoseg.training import checkpoint"
    packages = {"training/data_module.py": down, "training/checkpoint.py": "", "extensions/tracking/tracker.py": ""}
    assert circles({**packages, "extensions/tracking/state.py": up}) == ["extensions - training"]
    inner = {"data/scan/scan.py": "from dinoseg.data.pairs.dataset import Pair", "data/scan/cache.py": ""}
    inner |= {"data/pairs/dataset.py": "", "data/pairs/pairing.py": "from dinoseg.data.scan import cache"}
    assert circles(inner) == ["data/pairs - data/scan"]
    files = {"losses/a.py": "from dinoseg.losses import b", "losses/b.py": "from dinoseg.losses.a import A"}
    assert circles(files) == ["losses/a.py - losses/b.py"]
    assert not circles({**files, "losses/b.py": "import torch"})


def same_names(files):
    """Return the names of classes that are defined more than once."""
    names = [node.name for source in files.values() for node in nodes(source) if isinstance(node, ast.ClassDef)]
    return {name for name, count in Counter(names).items() if count > 1}


def test_class_names_are_unique():
    assert same_names(FILES) == set()
    files = {"losses/a.py": "class A:\n    class B: ...", "tasks/b.py": "def f():\n    class B: ...", "c.py": "A = 1"}
    assert same_names(files) == {"B"}


def test_contracts_have_defaults_instead_of_hasattr():
    names = {file: {getattr(node, "id", None) for node in nodes(source)} for file, source in FILES.items()}
    asking = [file for file in FILES if "hasattr" in names[file]]
    assert {below(file, ASK_OTHERS) for file in asking} == {*ASK_OTHERS}


def pickle_collectives(file, source):
    """Return the lines that name a collective operation which pickles what it sends."""
    found = []
    for node in nodes(source):
        name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
        if isinstance(node, ast.Attribute | ast.Name | ast.alias) and name.rpartition(".")[2] in PICKLE_COLLECTIVES:
            found.append(f"{file}:{node.lineno}: {name}: use Engine.gather or Engine.broadcast")
    return found


def test_ranks_exchange_no_pickles():
    assert not [line for file, source in FILES.items() for line in pickle_collectives(file, source)]
    planted = "from accelerate.utils import gather_object\nimport torch\ntorch.distributed.send_object_list([1])"
    assert len(pickle_collectives("training/engine.py", planted)) == 2


def test_no_package_outgrows_the_others():
    assert not large_packages(FILES), "\n".join(large_packages(FILES))
    files = {"data/idd.py": "x = 1\n" * 19, **{f"{name}.py": "x = 1\n" * 9 for name in "abcdefghi"}}
    assert large_packages(files) == ["data: 19.0% of the lines"]
    assert not large_packages({**files, "data/idd.py": "x = 1\n" * 17})


def test_files_and_functions_stay_small():
    violations = [line for file, source in FILES.items() for line in size_violations(file, source)]
    assert not violations, "\n".join(violations)
    body = "    x = 1\n" * 80
    assert size_violations("heads/cnn.py", f"def long():\n{body}") == ["heads/cnn.py: long has 81 lines"]
    assert not size_violations("heads/cnn.py", "def short():\n    # why\n" + "    x = 1\n" * 79)
    assert size_violations("heads/cnn.py", f"class A:\n    def long(self):\n{body.replace('    ', '        ')}")
    assert size_violations("heads/cnn.py", "x = 1\n" * 501) == ["heads/cnn.py: 501 lines"]


def functions_of_configs(source):
    """Return the names of functions that take a config, by the parameter's name or annotation."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            annotations = [ast.unparse(each.annotation) for each in parameters if each.annotation]
            if any(each.arg == "cfg" for each in parameters) or any("DictConfig" in text for text in annotations):
                found.append(node.name)
    return found


def test_config_ends_at_the_edge():
    files = {file: source for file, source in FILES.items() if not below(file, WITH_CONFIG)}
    assert len(files) > 300
    assert not {file: names for file, source in files.items() if (names := functions_of_configs(source))}
    # each mode is one more, so modes do not count
    not_modes = {
        file: source for file, source in FILES.items() if top_level(file) != "modes" and not file.endswith("_mode.py")
    }
    assert sum(len(functions_of_configs(source)) for source in not_modes.values()) <= 70
    planted = "def a(cfg): ...\nclass B:\n    def b(self, *, data: DictConfig | None = None): ...\ndef c(config): ..."
    assert functions_of_configs(planted) == ["a", "b"]


def test_hidden_names_stay_inside_their_file():
    names = [(file, name) for file, source in FILES.items() for _, name in find_imports(source)]
    own = [(file, name) for file, name in names if name.startswith("dinoseg.") and not name.endswith(".__version__")]
    assert len(own) > 100
    assert not [(file, name) for file, name in own if any(part.startswith("_") for part in name.split("."))]


def test_the_files_to_read_first_are_short():
    page = (PACKAGE.parent / "docs/architecture.md").read_text("utf-8")
    table = page.partition("## Read the core in this order")[2].partition("\n## ")[0]
    names = re.findall(r"^\| (?:\*\*)?`(\S+\.py)`", table, flags=re.MULTILINE)
    assert len(names) == len({*names}) > 50 and {*names} <= {*FILES}
    bold = re.findall(r"^\| \*\*`(\S+\.py)`", table, flags=re.MULTILINE)
    lines = [line for name in bold for line in FILES[name].splitlines() if not line.lstrip().startswith("#")]
    assert len(bold) == 13 and len(lines) < 3200
