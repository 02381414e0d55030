"""Files that describe the repository: types, citation, security, dependencies, the container."""

import re
import tomllib
import zipfile

import pytest
import yaml
from docs_pages import PAGES, ROOT, commands
from packaging.requirements import Requirement
from packaging.version import Version
from poetry.core.masonry.api import build_wheel

CONTENT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = CONTENT["project"]
LISTS = (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values(), *CONTENT["dependency-groups"].values())
REQUIREMENTS = [Requirement(text) for each in LISTS for text in each if isinstance(text, str)]
FIXED = {  # first version without published advisories of its own, by November 2026
    **{"torch": "2.11", "transformers": "5.5", "hydra-core": "1.3.7", "pillow": "13", "jinja2": "3.1.6"},
    **{"tqdm": "4.66.3", "onnx": "1.22", "starlette": "1.3.1", "fastapi": "0.109.1", "mlflow-skinny": "3.16"},
    **{"pytest": "9.0.3", "monai": "1.6.1", "flask": "3.1.3", "flask-cors": "6"},
}


@pytest.mark.parametrize("name", FIXED)
def test_minimum_versions_include_published_fixes(name):
    specifiers = [requirement.specifier for requirement in REQUIREMENTS if requirement.name == name]
    assert specifiers
    for specifier in specifiers:
        bounds = [Version(each.version) for each in specifier if each.operator == ">="]
        assert bounds and max(bounds) >= Version(FIXED[name])


def test_the_lock_file_satisfies_all_minimum_versions():
    packages = tomllib.loads((ROOT / "poetry.lock").read_text("utf-8"))["package"]
    locked = {package["name"]: package["version"] for package in packages}
    versions = [(each, locked[each.name.lower()]) for each in REQUIREMENTS]
    assert [str(each) for each, version in versions if not each.specifier.contains(version, prereleases=True)] == []
    assert len(versions) > 50


def test_the_wheel_has_type_annotations_configs_and_assets(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        assert {"dinoseg/py.typed", "dinoseg/cfg/main.yaml"} <= {*wheel.namelist()}
        assets = {
            path.removeprefix("dinoseg/assets/") for path in wheel.namelist() if path.startswith("dinoseg/assets/")
        }
        models = {f"{name}.{suffix}" for name in ("objects", "surgery") for suffix in ("jpg", "safetensors")}
        assert assets == models | {"tiny_surgical.safetensors"}


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    (author,) = citation["authors"]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"title = {{{citation['title']}}}" in readme and f"author = {{{{{author['name']}}}}}" in readme


def test_the_security_policy_leads_to_the_guarantees():
    (link,) = re.findall(r"\]\((\S+)\)", (ROOT / "SECURITY.md").read_text("utf-8"))
    assert "## What is promised" in (ROOT / link).read_text("utf-8")


def test_container_copies_the_package_and_installs_as_documented():
    text = (ROOT / "Dockerfile").read_text("utf-8")
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.M) for word in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    packages = {package["include"] for package in CONTENT["tool"]["poetry"]["packages"]}
    needed = {PROJECT["readme"], *PROJECT["license-files"], *packages}
    assert copied == {"pyproject.toml", *needed}
    install = commands(ROOT / "docs/install.md")[:2]
    assert install == ["python3 -m venv .venv && . .venv/bin/activate", "pip install ."]
    assert " && ".join(install).replace("pip install", "pip install --no-cache-dir") in text
    bases = re.findall(r"BASE=([\w./-]+:[\w.-]+)", text + (ROOT / "docs/install.md").read_text("utf-8"))
    assert len(bases) == 2 and {"dinoseg"} == {*PROJECT["scripts"]} and 'ENTRYPOINT ["dinoseg"]' in text


def test_no_page_has_a_placeholder_for_an_address():
    files = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "Dockerfile"))]
    assert [path.name for path in files if "ADDRESS" in path.read_text("utf-8")] == []
