"""Files that describe the repository: types, citation, security, the container."""

import re
import tomllib
import zipfile

import yaml
from docs_pages import PAGES, ROOT, commands
from poetry.core.masonry.api import build_wheel

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_wheel_has_type_annotations_and_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        assert {"dinoseg/py.typed", "dinoseg/cfg/main.yaml"} <= {*wheel.namelist()}


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
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["poetry"]["packages"]
    needed = {PROJECT["readme"], *PROJECT["license-files"], *(package["include"] for package in packages)}
    assert copied == {"pyproject.toml", *needed}
    install = commands(ROOT / "docs/install.md")[:2]
    assert install == ["python3 -m venv .venv && . .venv/bin/activate", "pip install ."]
    assert " && ".join(install).replace("pip install", "pip install --no-cache-dir") in text
    bases = re.findall(r"BASE=([\w./-]+:[\w.-]+)", text + (ROOT / "docs/install.md").read_text("utf-8"))
    assert len(bases) == 2 and {"dinoseg"} == {*PROJECT["scripts"]} and 'ENTRYPOINT ["dinoseg"]' in text


def test_no_page_has_a_placeholder_for_an_address():
    files = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "Dockerfile"))]
    assert [path.name for path in files if "ADDRESS" in path.read_text("utf-8")] == []
