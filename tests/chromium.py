"""A real headless Chromium: pages of a test, and what their consoles said."""

import os
import shutil
from contextlib import contextmanager

import pytest

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")


def _note_failure(page, request):
    """Add a failed request to the page's complaints, unless leaving the page has cancelled it."""
    if request.failure != "net::ERR_ABORTED":  # such as an icon that the next `goto` overtakes
        page.complaints.append(f"failed: {request.url}: {request.failure}")


@contextmanager
def opened_page(address, *, width=1280, height=900):
    """Open an address and give the page; `page.complaints` are its console's errors and every request that left it."""
    program = shutil.which("chromium")
    if program is None:
        assert not os.environ.get("CI"), "no chromium: .ci/run installs it"
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.complaints = []
        page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("requestfailed", lambda request: _note_failure(page, request))
        page.goto(address)
        try:
            yield page
        finally:
            browser.close()
