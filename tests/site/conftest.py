"""The built site behind a local server, and a headless browser to read it with."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
from playwright import sync_api

SITE = Path(__file__).parents[2] / "site"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_sessionstart(session):
    problems = []
    if browser_path() is None:
        problems.append(
            "the site is read with Chromium, and none is there. Install it, with "
            "`apt-get install chromium` for instance, or name one in CHROMIUM"
        )
    if not (SITE / "index.html").exists():
        problems.append(f"{SITE} has no built site. Run `make site`")
    if problems:
        pytest.exit("; ".join(problems) + ".", returncode=2)


def browser_path():
    """Returns the path of a Chromium, if there is one."""
    given = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, [given] if given else NAMES)), None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def address():
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    with sync_api.sync_playwright() as driver:
        # Its sandbox does not start for root, as in containers.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=browser_path(), args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    yield page
    page.close()
