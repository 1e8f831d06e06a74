"""The built site, as a reader's browser sees it."""

from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "site"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
READ = [name for name in PAGES if name != "404.html"]

LINKS = """[...document.querySelectorAll('a[href], link[href], img[src], script[src]')]
    .map(node => node.href || node.src)"""
ANCHORS = (
    "[...document.querySelectorAll('[id], a[name]')].map(node => node.id || node.name)"
)
# Elements that are wider than the screen and not within one that scrolls.
TOO_WIDE = """[...document.querySelectorAll('.md-content *')].filter(node => {
  if (node.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let up = node; up; up = up.parentElement)
    if (getComputedStyle(up).overflowX != 'visible') return false;
  return true;
}).map(node => node.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def opened(browser, address):
    """Opens every page once; returns what each holds, and what went wrong."""
    page, found, errors, asked = browser.new_page(), {}, [], []
    page.on("console", lambda m: m.type == "error" and errors.append(m.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda r: r.status >= 400 and errors.append(f"absent: {r.url}"))
    for name in READ:
        page.goto(address + name, wait_until="networkidle")
        found[name] = {"links": page.evaluate(LINKS), "ids": page.evaluate(ANCHORS)}
    page.close()
    return found, errors, asked


def test_the_site_has_the_pages_of_the_navigation():
    assert {"index.html", "guide/choose.html", "api/transforms.html"} <= {*READ}


def test_no_page_reports_an_error(opened):
    assert opened[1] == []


def test_nothing_is_fetched_from_elsewhere(opened, address):
    local = (address, "data:", "blob:")
    assert {url for url in opened[2] if not url.startswith(local)} == set()


def test_no_link_within_the_site_is_dead(opened, address):
    found = opened[0]
    dead = set()
    for name, parts in found.items():
        for link in parts["links"]:
            if not link.startswith(address):
                continue
            target, _, anchor = link.removeprefix(address).partition("#")
            target = target.partition("?")[0] or "index.html"
            known = (SITE / target).is_file()
            if not known or (anchor and anchor not in found[target]["ids"]):
                dead.add(f"{name}: {target}#{anchor}")
    assert dead == set()


def test_the_search_finds_galore(page, address):
    page.goto(address + "index.html", wait_until="networkidle")
    page.locator("input.md-search__input").press_sequentially("galore")
    results = page.locator(".md-search-result__item a")
    results.first.wait_for()
    links = [result.get_attribute("href") for result in results.all()]
    assert any("how/galore.html" in link for link in links)
    assert any("api/transforms.html" in link for link in links)


@pytest.mark.parametrize("name", READ)
def test_a_page_is_readable_at_the_width_of_a_phone(page, address, name):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(address + name, wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(TOO_WIDE) == []
