"""Minimum versions of the dependencies: none below a published security fix, and the lock file satisfies all."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FIXED = {  # first version without published advisories of its own, by November 2026
    "torch": "2.11",
    "transformers": "5.5",
    "hydra-core": "1.3.7",
    "pillow": "13",
    "jinja2": "3.1.6",
    "tqdm": "4.66.3",
    "onnx": "1.22",
    "starlette": "1.3.1",
    "fastapi": "0.109.1",
    "mlflow-skinny": "3.16",
    "pytest": "9.0.3",
    "monai": "1.6.1",
    "flask": "3.1.3",
    "flask-cors": "6",
}


def read_requirements():
    """Return every requirement of the project, its extras and its groups."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = content["project"]
    lists = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *content["dependency-groups"].values(),
    ]
    return [Requirement(text) for each in lists for text in each if isinstance(text, str)]


def lower_bound(requirement):
    """Return the least version that a requirement allows, or None."""
    bounds = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
    return max(bounds, default=None)


@pytest.mark.parametrize("name", FIXED)
def test_minimum_versions_include_published_fixes(name):
    bounds = [lower_bound(requirement) for requirement in read_requirements() if requirement.name == name]
    assert bounds and all(bound is not None and bound >= Version(FIXED[name]) for bound in bounds)


def test_the_lock_file_satisfies_all_minimum_versions():
    packages = tomllib.loads((ROOT / "poetry.lock").read_text("utf-8"))["package"]
    locked = {package["name"]: package["version"] for package in packages}
    unmet = [
        str(requirement)
        for requirement in read_requirements()
        if not requirement.specifier.contains(locked[requirement.name.lower()], prereleases=True)
    ]
    assert len(read_requirements()) > 50 and not unmet
