"""Who may import whom, which door leads to which heavy dependency, and how large files and functions get."""

import ast
from pathlib import Path

import pytest

import dinoseg

PACKAGE = Path(dinoseg.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}

LEVELS = (  # a room imports its own level and those below
    (
        "__init__",
        "errors",
        "wording",
        "shapes",
        "contracts",
        "geometry",
        "class_ids",
        "mixed_class_ids",
        "sizes",
        "precision",
        "transfer",
        "devices",
        "images",
        "image_bounds",
        "ranges",
        "bounded_regex",
        "storage",
        "processes",
        "label_tables",
        "annotation",
        "report",
    ),
    ("backbones", "heads", "losses", "metrics", "data", "synthetic"),  # leaves
    ("model", "adapters", "inference", "scoring", "doctor", "config"),
    ("tracking",),
    ("training",),
    ("build", "criteria"),
    ("runs",),
    ("evaluation", "preparation", "portable", "probing", "selection"),
    ("exporting", "serving"),
    ("regimes", "sweeps"),
    ("costs", "diagnosis"),
    ("choosing",),
    ("modes",),
    ("ranks", "command"),
    ("launch",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LEAVES = LEVELS[1]  # these never import one another, and build names none of them
ABOVE_BUILD = (
    "runs",
    "evaluation",
    "preparation",
    "portable",
    "probing",
    "selection",
    "exporting",
    "serving",
    "regimes",
    "sweeps",
    "costs",
    "diagnosis",
    "choosing",
    "modes",
    "ranks",
    "launch",
)
TRACKERS = ("tracking/propagation", "tracking/slots", "tracking/smoothing")  # siblings: none imports another
DOORS = {  # dependency to the rooms and files that may import it
    "hydra": ("config", "runs", "sweeps", "modes", "launch", "command", "__main__"),
    "omegaconf": ("config", "build", "criteria", *ABOVE_BUILD, "command", "__main__"),
    "hydra.utils": ("config/nodes",),
    "accelerate": ("training/engine",),
    "peft": ("adapters",),
    "bitsandbytes": ("adapters",),
    "transformers": ("backbones", "heads/upernet"),
    "scipy": ("losses/matching", "metrics", "scoring/intervals"),
    "tqdm": ("report/progress", "training/meter"),  # one bar, which a pipe can read too
    "timm": ("backbones",),
    "tensorboard": ("report/log",),
    "torch.utils.tensorboard": ("report/log",),
    "onnx": ("exporting",),
    "onnxscript": ("exporting",),
    "onnxruntime": ("portable",),
    "huggingface_hub": ("backbones", "portable"),
    "starlette": ("serving",),
    "uvicorn": ("serving",),
    "optuna": ("sweeps/search", "sweeps/study"),
    "av": ("data/video/decoder", "inference/video_writer", "inference/sound"),
}
EXCEPTIONS = {
    ("__main__.py", "dinoseg.modes.help.help_for"),  # printed before hydra and torch are imported
    ("__init__.py", "dinoseg.portable.load.load"),  # dinoseg.load, imported when it is asked for
    ("__init__.py", "dinoseg.portable.model.Model"),  # likewise
}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LOOP = 500, 80, 90
LOOPS = (("training/fit.py", "fit"), ("training/many_heads.py", "fit_heads"))
LARGEST_ROOM = 0.18  # of the lines: above it a room is two


def imported(source):
    """Yield (line, full dotted name) of everything imported anywhere in a file, and `.` for a relative import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." if node.level else node.module
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def import_violations(file, source):
    """Return what a file of the package imports against the rules, one line each."""
    own, found = room_of(file), []
    for line, name in imported(source):
        if (file, name) in EXCEPTIONS:
            continue
        if name.startswith(".") or name.endswith(".*"):
            found.append(f"{file}:{line}: {name}: import absolutely, and by name")
        elif name == "dinoseg" or name.startswith("dinoseg."):
            other = (name.split(".") + ["__init__"])[1]
            found += [f"{file}:{line}: {rule}" for rule in broken_rules(own, other if other in LEVEL else "__init__")]
        tracker, other_tracker = tracker_of(file.removesuffix(".py")), tracker_of("/".join(name.split(".")[1:]))
        if tracker and other_tracker and tracker != other_tracker:
            found.append(f"{file}:{line}: {tracker} imports {other_tracker}: trackers are siblings")
        for door, places in DOORS.items():
            if f"{name}.".startswith(f"{door}.") and not {own, file.removesuffix(".py")} & set(places):
                found.append(f"{file}:{line}: only {', '.join(places)} may import {door}")
    return found


def tracker_of(path):
    return next((tracker for tracker in TRACKERS if f"{path}/".startswith(f"{tracker}/")), None)


def room_of(file):
    return file.split("/")[0].removesuffix(".py")


def broken_rules(own, other):
    if LEVEL[other] > LEVEL[own]:
        yield f"{own} (level {LEVEL[own]}) imports {other} (level {LEVEL[other]})"
    if own != other and {own, other} <= set(LEAVES):
        yield f"{own} imports {other}: leaves know nothing of one another"
    if own in ("build", "criteria") and other in LEAVES:
        yield f"{own} imports {other}: it names leaves through _target_ only"
    if (own, other) in (("launch", "modes"), ("__main__", "modes")):
        yield f"{own} imports {other}: modes are reached through _target_ only"


def circles(files):
    """Return the circles of imports between files, between the packages inside rooms, and between rooms."""
    by_file = {file: {other for other in map(file_of(files), names(source)) if other} for file, source in files.items()}
    graphs = (by_file, joined(by_file, package_of), joined(by_file, room_of))
    return sorted({" - ".join(sorted(circle)) for graph in graphs for circle in _strongly_connected(graph)})


def joined(graph, group):
    """Return a graph of imports between groups of files; what a group imports of itself does not count."""
    whole = {}
    for file, others in graph.items():
        whole.setdefault(group(file), set()).update(group(other) for other in others)
    return {name: others - {name} for name, others in whole.items()}


def package_of(file):
    """Return the package inside a room that a file is in, else the file itself."""
    parts = file.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else file


def names(source):
    return (name for _, name in imported(source))


def file_of(files):
    """Return the function from an imported name to the file of the package that it is of, None for another's."""

    def find(name):
        parts = name.split(".")[1:] if name.startswith("dinoseg.") else []
        paths = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        return next(
            (f"{path}{end}" for path in paths for end in (".py", "/__init__.py") if f"{path}{end}" in files), None
        )

    return find


def _strongly_connected(graph):
    """Return the sets of nodes of which each leads to each."""
    reached = {node: _reached(graph, node) for node in graph}
    circles = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return [circle for circle in circles if circle]


def _reached(graph, start):
    reached, waiting = set(), [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def large_rooms(files):
    """Return the rooms that hold more than their share of the lines."""
    lines = {}
    for file, source in files.items():
        lines[room_of(file)] = lines.get(room_of(file), 0) + len(source.splitlines())
    shares = {room: count / sum(lines.values()) for room, count in lines.items()}
    return [f"{room}: {share:.1%} of the lines" for room, share in shares.items() if share > LARGEST_ROOM]


def size_violations(file, source):
    """Return the file and the functions of it that are too long."""
    found = [f"{file}: {lines} lines"] if (lines := len(source.splitlines())) > LONGEST_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            limit = LONGEST_LOOP if (file, node.name) in LOOPS else LONGEST_FUNCTION
            found += [f"{file}: {node.name} has {length} lines"] if length > limit else []
    return found


def test_imports_go_down_and_through_their_doors():
    visited, names, violations = 0, 0, []
    for file, source in FILES.items():
        visited, names = visited + 1, names + len(list(imported(source)))
        violations += import_violations(file, source)
    assert visited == len(list(PACKAGE.glob("**/*.py"))) >= 50 and names > 5 * visited
    assert not violations, "\n".join(violations)


def test_every_room_has_its_level():
    rooms = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))
    }
    assert rooms == LEVEL.keys()
    assert all(
        any((PACKAGE / f"{place}{end}").exists() for end in ("", ".py"))
        for at in (*DOORS.values(), TRACKERS)
        for place in at
    )


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("heads/cnn.py", "from dinoseg.losses.cross_entropy import CrossEntropy", "leaves know nothing"),
        ("data/voc.py", "import dinoseg.backbones.transformers_vit", "leaves know nothing"),
        ("report/html.py", "from dinoseg.metrics.confusion import Confusion", "report (level 0) imports metrics"),
        ("metrics/iou.py", "from dinoseg.model import Segmenter", "metrics (level 1) imports model"),
        ("training/fit.py", "def late():\n    from dinoseg import build", "training (level 4) imports build"),
        ("evaluation/official.py", "from dinoseg.modes.score import run", "imports modes"),
        ("evaluation/images.py", "from dinoseg.regimes.images import TrainImages", "imports regimes"),
        ("tracking/video/state.py", "from dinoseg.training import checkpoint", "imports training"),
        ("build.py", "from dinoseg.heads.linear import LinearHead", "through _target_ only"),
        ("build.py", "from dinoseg import heads", "through _target_ only"),
        ("launch.py", "from dinoseg.modes import train", "through _target_ only"),
        ("__main__.py", "from dinoseg.modes.train import train", "through _target_ only"),
        ("losses/dice.py", "from omegaconf import DictConfig", "may import omegaconf"),
        ("training/fit.py", "import hydra.core.hydra_config", "may import hydra"),
        ("modes/train.py", "from hydra.utils import instantiate", "may import hydra.utils"),
        ("modes/train.py", "from hydra import utils", "may import hydra.utils"),
        ("training/fit.py", "if True:\n    from accelerate import Accelerator", "may import accelerate"),
        ("heads/cnn.py", "import peft.tuners as tuners", "may import peft"),
        ("model.py", "from transformers import AutoModel", "may import transformers"),
        ("report/curves.py", "from torch.utils.tensorboard import SummaryWriter", "may import torch.utils.tensorboard"),
        ("report/curves.py", "from torch.utils import tensorboard", "may import torch.utils.tensorboard"),
        ("tracking/smoothing.py", "from dinoseg.tracking.slots.matching import cosine", "trackers are siblings"),
        ("tracking/slots/following.py", "from dinoseg.tracking import smoothing", "trackers are siblings"),
        ("heads/cnn.py", "from .linear import LinearHead", "absolutely"),
        ("heads/cnn.py", "from dinoseg.geometry import *", "by name"),
    ],
)
def test_a_planted_violation_is_found(file, source, message):
    assert any(message in found for found in import_violations(file, source)), import_violations(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "heads/cnn.py",
            "import torch\nfrom dinoseg.geometry import upsample\nfrom dinoseg.heads.linear import LinearHead",
        ),
        ("modes/train.py", "from dinoseg import build\nfrom dinoseg.synthetic.surgery.write import render_dataset"),
        (
            "tracking/slots/tracker.py",
            "from dinoseg.tracking.grid import cells\nfrom dinoseg.tracking.slots.matching import cosine",
        ),
        ("training/engine.py", "from accelerate.utils import broadcast_object_list"),
        ("runs/resume.py", "from dinoseg import __version__, build"),
    ],
)
def test_what_is_allowed_passes(file, source):
    assert not import_violations(file, source)


def test_no_import_leads_back():
    assert not circles(FILES), "\n".join(circles(FILES))


def test_planted_circles_are_found():
    down, up = "from dinoseg.tracking.tracker import VideoTracker", "from dinoseg.training import checkpoint"
    rooms = {"training/feed.py": down, "training/checkpoint.py": "", "tracking/tracker.py": "", "tracking/state.py": up}
    assert circles(rooms) == ["tracking - training"]
    inner = {"data/scan/scan.py": "from dinoseg.data.pairs.dataset import Pair", "data/scan/cache.py": ""}
    inner |= {"data/pairs/dataset.py": "", "data/pairs/pairing.py": "from dinoseg.data.scan import cache"}
    assert circles(inner) == ["data/pairs - data/scan"]
    files = {"heads/cnn.py": "from dinoseg.heads import mlp", "heads/mlp.py": "from dinoseg.heads.cnn import CNNHead"}
    assert circles(files) == ["heads/cnn.py - heads/mlp.py"]
    assert not circles({**files, "heads/mlp.py": "import torch"})


def test_no_room_outgrows_the_house():
    assert not large_rooms(FILES), "\n".join(large_rooms(FILES))


def test_a_planted_large_room_is_found():
    files = {"data/idd.py": "x = 1\n" * 19, **{f"{room}.py": "x = 1\n" * 9 for room in "abcdefghi"}}
    assert large_rooms(files) == ["data: 19.0% of the lines"]
    assert not large_rooms({**files, "data/idd.py": "x = 1\n" * 17})


def test_files_and_functions_stay_small():
    violations = [line for file, source in FILES.items() for line in size_violations(file, source)]
    assert not violations, "\n".join(violations)


def test_a_planted_long_file_and_function_are_found():
    body = "    x = 1\n" * 80
    assert size_violations("heads/cnn.py", f"def long():\n{body}") == ["heads/cnn.py: long has 81 lines"]
    assert size_violations("heads/cnn.py", f"class A:\n    def long(self):\n{body.replace('    ', '        ')}")
    assert not size_violations("training/fit.py", f"def fit():\n{body}")
    assert size_violations("heads/cnn.py", "x = 1\n" * 501) == ["heads/cnn.py: 501 lines"]


def test_hidden_names_stay_inside_their_file():
    seen, hidden = 0, []
    for file, source in FILES.items():
        for line, name in imported(source):
            seen += name.startswith("dinoseg.")
            if name.startswith("dinoseg.") and any(
                part.startswith("_") and part != "__version__" for part in name.split(".")
            ):
                hidden.append(f"{file}:{line}: {name}")
    assert seen > 100 and not hidden
