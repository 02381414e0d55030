"""What the docs say of files, targets, tests and one another is so."""

import re

import pytest
from docs_pages import LOG, PAGES, ROOT, commands

from dinoseg.modes import help as help_mode

REFERENCES = {"architecture", "config", "data", "decisions", "extending", "scores"}  # read in parts
LINK = re.compile(r"""(?<!`)(?:\[[^\]]*\]\(|<img src=")([^)\s"]+)[)"]""")


def test_no_line_is_longer_than_those_of_the_code():
    files = [*PAGES, *LOG, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "dinoseg/cfg").rglob("*.yaml")]
    lines = [(path, number, line) for path in files for number, line in enumerate(path.read_text().split("\n"), 1)]
    long = [f"{path.name}:{number}" for path, number, line in lines if len(line) > 120 and "| `tests/" not in line]
    assert long == [] and len(lines) > 3000  # Markdown cannot wrap a row of a table


def test_commands_quote_what_zsh_takes_for_patterns():
    found = [command for page in [*PAGES, ROOT / "CONTRIBUTING.md"] for command in commands(page)]
    found += help_mode.COMMANDS.splitlines()
    bare = [re.sub("""'[^']*'|"[^"]*\"""", "", command.partition(" #")[0]) for command in found]
    assert len(bare) > 100 and [command for command in bare if {*"[]{}*?"} & {*command}] == []


def test_architecture_page_names_all_packages_and_existing_files():
    page = (ROOT / "docs/architecture.md").read_text()
    paths = [*ROOT.glob("*"), *ROOT.glob("*/**/*")]
    files = {path.relative_to(ROOT).as_posix() for path in paths if ".venv" not in path.parts}
    named = re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", page)
    missing = [name for name in named if not any(f"/{file}".endswith(f"/{name.rstrip('/')}") for file in files)]
    assert len(named) > 40 and not missing
    package = {path.name for path in (ROOT / "dinoseg").iterdir() if not path.name.startswith("__") and path.is_dir()}
    assert [name for name in package - {"assets"} if f"{name}/" not in page.split("## A training run")[0]] == []


def test_each_promise_names_a_test():
    text = (ROOT / "docs/security.md").read_text().split("## What is promised")[1].split("## What is not")[0]
    promises = text.split("\n- ")[1:]
    assert len(promises) >= 15
    for promise in promises:
        file, name = re.search(r"\(`(tests/\S+)::(\w+)`\)", promise).groups()
        assert f"def {name}(" in (ROOT / file).read_text(), promise


def test_each_promise_of_the_servers_has_a_state_and_a_test():
    text = (ROOT / "docs/security.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "| test |" not in line]
    rows = [line.strip("|").split("|") for line in lines]
    assert len(rows) >= 25
    for promise, state, tests in rows:
        named = re.findall(r"`(tests/[^`:]+)::(\w+)`", tests)
        assert re.match(" (holds|new|proxy|withdrawn)", state) and (named or "proxy" in state or "withdrawn" in state)
        assert all(f"def {name}(" in (ROOT / file).read_text() for file, name in named), promise


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    named = {word for page in PAGES for word in re.findall(r"`?make ([a-z]+)`", page.read_text())}
    assert named and named <= targets


FENCE = re.compile(r"^ *```.*?^ *```", flags=re.S | re.M)


def without_code(page):
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def anchors(page):
    """Return the anchors of a page's headings, where GitHub's and those of the site's are the same."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), flags=re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", text) for text in plain} & {re.sub(r"[-\s]+", "-", text) for text in plain}


@pytest.mark.parametrize("page", [*PAGES, *LOG], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_existing_targets(page):
    for target in LINK.findall(without_code(page)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target} names no heading"
        # the site holds docs/ alone
        assert page.name == "README.md" or there.is_relative_to(ROOT / "docs"), f"{page.name}: {target}"


def test_every_page_is_once_in_the_navigation_and_the_contents():
    # of the log its index alone
    pages = {"log/index.md", *(path.relative_to(ROOT / "docs").as_posix() for path in PAGES[1:])}
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert sorted(re.findall(r"[\w/]+\.md", navigation)) == sorted(pages) and len(pages) > 10
    links = [link for link in LINK.findall((ROOT / "docs/index.md").read_text()) if link.endswith(".md")]
    assert sorted(["index.md", *links]) == sorted(pages)
    of_log = LINK.findall((ROOT / "docs/log/index.md").read_text().split("## ")[0])
    assert sorted(link for link in of_log if "/" not in link) == [path.name for path in LOG if path.stem != "index"]


@pytest.mark.parametrize("page", [path for path in LOG if path.stem != "index"], ids=lambda page: page.stem)
def test_log_entries_with_commands_name_date_and_version(page):
    entries = re.split(r"^#+ ", page.read_text(), flags=re.M)
    stamp = re.compile(r"^\*Recorded 20\d\d-\d\d-\d\d( to 20\d\d-\d\d-\d\d)?, version [0-9a-f]{8}\.\*$", flags=re.M)
    assert [entry.split("\n")[0] for entry in entries if commands(entry) and not stamp.search(entry)] == []
    assert any(stamp.search(entry) for entry in entries)


def test_pages_of_results_are_short_and_name_existing_scripts():
    for name in ("results", "performance"):
        text = FENCE.sub("", (ROOT / f"docs/{name}.md").read_text())
        assert len(re.findall(r"[^\s|]*\w[^\s|]*", text)) <= 900, f"{name}.md: move measurements to docs/log"
    scripts = set(re.findall(r"`(\w+\.py)", (ROOT / "docs/performance.md").read_text()))
    missing = [name for name in scripts if not (ROOT / "benchmarks" / name).is_file()]
    assert missing == [] and len(scripts) > 10
    readme = FENCE.sub("", (ROOT / "README.md").read_text())
    assert len(readme.split()) <= 500 and "docs/index.md" in LINK.findall(readme)


def test_config_page_names_all_groups_and_existing_options():
    page = (ROOT / "docs/config.md").read_text()
    named = set(re.findall(r"`([^`]+)`", page))
    folders = {path.parent for path in (ROOT / "dinoseg/cfg").rglob("*.yaml")}
    groups = {folder.relative_to(ROOT / "dinoseg/cfg").as_posix() for folder in folders} - {".", "hydra", "runtime"}
    keys = re.findall(r"^(\w+):", (ROOT / "dinoseg/cfg/main.yaml").read_text(), flags=re.M)
    words = named | {name.split(".")[0] for name in named}
    assert len(groups) > 15
    assert ({group for group in groups if not group.startswith("hparam/")} | set(keys[1:])) - words == set()
    # --help lists all options: one that is added needs no line here
    group = ""
    options = []
    for first, second in re.findall(r"^\| (.*?) \| (.*?) \|", page.split("## Groups")[1].split("##")[0], flags=re.M):
        group = first.strip("`") or group
        options += [(group, word) for word in re.findall(r"`([\w/]+)`", second)]
    missing = [pair for pair in options if not (ROOT / "dinoseg/cfg" / f"{'/'.join(pair)}.yaml").is_file()]
    assert missing == [] and len(options) > 60


def test_all_pages_but_references_have_at_most_2500_words():
    words = {page.stem: len(page.read_text().split()) for page in PAGES}
    assert {name for name, count in words.items() if count > 2500} <= REFERENCES


def test_pictures_are_small_and_shown():
    shown = {link.rpartition("/")[2] for page in [*PAGES, *LOG] for link in LINK.findall(page.read_text())}
    for path in (ROOT / "docs/pictures").iterdir():
        assert path.stat().st_size < 200_000, f"{path.name}: over 200 kB"
        assert path.name in shown, f"{path.name} is shown nowhere"
