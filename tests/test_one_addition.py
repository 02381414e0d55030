"""One addition of each kind is one Python file, one YAML file and one test: no other file of the repository changes."""

import os
import shutil
import subprocess
import sys

import pytest
from docs_pages import ROOT, blocks

CHECKS = (  # tests that look at all files of the package or at all options; those of an addition's own are its author's
    "tests/test_architecture.py::test_imports_go_down_and_through_their_doors",
    "tests/test_architecture.py::test_config_ends_at_the_edge",
    "tests/config/test_configs.py::test_every_option_of_every_other_group_composes",
    "tests/config/test_configs.py::test_modes_declare_their_launch_keys",
    "tests/config/test_configs.py::test_backbone_options_set_only_keys_of_their_family",
    "tests/modes/test_reads.py::test_mode_composes_exactly_the_keys_its_code_reads[balance]",
    "tests/modes/test_help.py::test_each_shipped_option_has_help",
    "tests/data/test_data_configs.py::test_every_config_is_whole[discs]",
    "tests/models/backbones/test_conformance.py::test_every_backbone_option_belongs_to_a_tested_family",
    "tests/test_recipes.py::test_rates_come_from_head_and_adapter_unless_one_is_set",
    "tests/test_ranges.py::test_every_number_of_a_config_has_a_range",
    "tests/test_language.py",
)
PLACES = {  # module and config group of docs/extending.md: those of the same kind in the repository
    "my_parts.adapters": "dinoseg.models.biases",
    "my_parts.heads": "dinoseg.models.heads.bottleneck",
    "my_parts.data": "dinoseg.data.formats.discs",
    "my_parts.tasks": "dinoseg.methods.smooth",
    "my_parts.trackers": "dinoseg.extensions.tracking.colour",
    "my_parts.modes": "dinoseg.modes.balance",
    "my_parts.loggers": "dinoseg.report.loggers.losses",
    "my_parts.losses": "dinoseg.losses.poly",
    "my_parts.metrics": "dinoseg.metrics.rare",
}
SPELLED_OUT = {  # constructors of the repository name their arguments, so that a wrong key is found
    "model, **options": "model, *, device, autocast, batch_size",
    "(**options": "(device=device, autocast=autocast, batch_size=batch_size",
}
OUTSIDE = (  # `grey` is the backbone of the copy
    *("mine/my_parts/backbones.py", "mine/config/backbone/patches.yaml", "mine/test_my_parts.py"),
    *("mine/my_parts/boundary.py", "mine/config/loss/boundary.yaml"),
    *("mine/my_parts/distance.py", "mine/config/data/distance_discs.yaml", "mine/config/data/distance_folder.yaml"),
)
OTHERS = {
    "dinoseg/models/backbones/grey.py": '''
"""Backbone that returns brightness."""

from collections.abc import Sequence

from torch import Tensor

from dinoseg.models.backbones.rgb import RgbBackbone


class GreyBackbone(RgbBackbone):
    """Brightness of each patch, three times."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the mean of the colours of each patch, (B, 3, h, w), for each layer."""
        return [colours.mean(1, keepdim=True).expand_as(colours) for colours in super().forward(images)]
''',
    "dinoseg/cfg/backbone/grey.yaml": """
_target_: dinoseg.models.backbones.grey.GreyBackbone
patch_size: 8                    # side of a patch in pixels
layers: ${head.layers}
""",
    "dinoseg/extensions/protocols/indoor.py": '''
"""Indoor scenes: ADE20K's scores over fewer classes."""

from dinoseg.extensions.protocols.ade20k import Ade20k
from dinoseg.utils.ranges import UpTo255


class Indoor(Ade20k):
    """Scores of ADE20K for 20 classes."""

    name = "indoor"

    def __init__(self, num_classes: UpTo255 = 20) -> None:
        super().__init__(num_classes)
''',
    "dinoseg/cfg/protocol/indoor.yaml": """
_target_: dinoseg.extensions.protocols.indoor.Indoor
num_classes: 20                  # number of classes
""",
}

pytestmark = pytest.mark.heavy


def additions():
    """Return path in the repository to text, of a Python and a YAML file of each kind."""
    found = dict(OTHERS)
    for _, text in blocks(ROOT / "docs/extending.md", "python|yaml"):
        path = text.split()[1]
        if path in OUTSIDE:
            continue
        for old, new in {**{f"{own}.": f"{place}." for own, place in PLACES.items()}, **SPELLED_OUT}.items():
            text = text.replace(old, new)
        module = path.removeprefix("mine/").removesuffix(".py").replace("/", ".")
        own = f"{PLACES[module].replace('.', '/')}.py" if module in PLACES else None
        path = own or path.replace("mine/config", "dinoseg/cfg")
        found[path] = text.partition("\n")[2]
    return found


def test_one_of_each_kind_passes_the_checks_of_all_files(tmp_path):
    copy = tmp_path / "repository"
    leave = shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__", ".*_cache", "local")
    shutil.copytree(ROOT, copy, ignore=leave)
    for path, text in additions().items():
        assert not (copy / path).exists()
        (copy / path).write_text(text.lstrip("\n"))
    # the test of a backbone is a line here
    parts = copy / "tests/tiny_parts.py"
    parts.write_text(parts.read_text().replace('{"rgb": ("rgb", {})', '{"rgb": ("rgb", {}), "grey": ("grey", {})'))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-5000:]
