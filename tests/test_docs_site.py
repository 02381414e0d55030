"""The docs as a site: built strictly, and opened from the disk in a browser, without any network."""

import re
import subprocess
import sys

import pytest
from chromium import opened_page
from docs_pages import LOG, PAGES, ROOT

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_documentation_site_fetches_nothing_external(site):
    for page in [*PAGES[1:], *LOG]:
        text = (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]+>", text), page


def test_api_page_has_an_entry_and_example_for_each_name(site):
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), flags=re.M)
    text = (site / "api.html").read_text()
    entries = re.split(r'id="(dinoseg(?:\.(?:losses|metrics|testing))?\.\w+)" class="doc doc-heading"', text)
    shown = dict(zip(entries[1::2], entries[2::2], strict=True))
    assert sorted(shown) == sorted(names) and len(names) > 30
    assert [name for name in names if "&gt;&gt;&gt;" not in shown[name]] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_open_on_a_desk_and_a_phone(site, width):
    with opened_page((site / "index.html").as_uri(), width=width) as page:
        for name in ("index", "results", "log/slots", "first_training", "api"):
            page.goto((site / f"{name}.html").as_uri())
            page.wait_for_load_state("load")
            for picture in page.query_selector_all("article img"):
                picture.scroll_into_view_if_needed()
                assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100, name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.complaints == [], name


def test_search_and_links_work_without_a_server(site):
    with opened_page((site / "index.html").as_uri()) as page:
        page.click(".md-search__input")
        page.keyboard.type("smoothing")
        page.wait_for_selector(".md-search-result__link[href*='video.html']", timeout=120_000)
        page.goto((site / "index.html").as_uri())
        page.click("article a[href='install.html']")
        page.wait_for_selector("h1:has-text('Install')")
        assert page.complaints == []
