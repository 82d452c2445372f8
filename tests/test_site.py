"""The site, built from what is there: nothing is missing on its pages, and a browser can use it."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from cells import NOTEBOOKS
from conftest import ROOT
from justhtml import JustHTML
from test_lab import BROWSER

pytest.importorskip("sphinx_book_theme", reason="needs the extra `site`, which the reference stack has")
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("default")]
LARGEST_BYTES = 1_500_000
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--output", str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder
    shutil.rmtree(folder.parent)


def then_and_today(text: str) -> list[list[str]]:
    """For each row of a table of then and today, its code and numbers, in order."""
    rows = re.search(r"^\| (?:Then|当年).*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.MULTILINE)
    return [sorted(re.findall(r"`[^`]+`", row)) for row in rows[1].strip().splitlines()] if rows else []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_chinese_page_says_the_same(path):
    notebook = nbformat.read(path, 4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    tables = [then_and_today(text) for text in texts]
    english = next((table for table in tables if table), [])
    page = (ROOT / "docs" / "zh" / f"{path.stem}.md").read_text(encoding="utf-8")
    assert then_and_today(page) == english
    summary = texts[0].split("**Needs**")[0].split("\n\n", 2)[-1]
    in_digits = re.compile(r"[\d,]*\d")
    assert sorted(in_digits.findall(page.split("\n|")[0])) == sorted(in_digits.findall(summary))


class Page(HTMLParser):
    """The links, anchors and pictures of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.pictures = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.anchors |= {known[name] for name in ("id", "name") if known.get(name)}
        if tag == "a" and known.get("href"):
            self.links.append(known["href"])
        if tag == "img":
            self.pictures.append(known)
            self.links.append(known["src"])


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_every_lesson_and_module_has_a_page(pages):
    assert {f"notebooks/{path.stem}.html" for path in NOTEBOOKS} <= set(pages)
    modules = {path.stem for path in (ROOT / "companion").glob("[!_]*.py")}
    assert {f"api/{name}.html" for name in modules} <= set(pages)
    assert {"index.html", "glossary.html", "measured.html", "cite.html", "contributing.html"} <= set(pages)


def test_links_and_anchors_lead_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            there = urlsplit(link)
            if there.scheme or there.netloc:
                continue
            target = (site / name).parent / unquote(there.path) if there.path else site / name
            target = target.resolve() / "index.html" if target.is_dir() else target.resolve()
            found = target.is_file() and target.is_relative_to(site)
            other = pages.get(target.relative_to(site).as_posix()) if found else None
            if not found or (there.fragment and other and unquote(there.fragment) not in other.anchors):
                broken.append(f"{name}: {link}")
    assert not broken, broken[:20]


def test_every_picture_has_a_text_and_loads_late(pages):
    for name, page in pages.items():
        for picture in page.pictures:
            assert picture.get("alt", "").strip(), f"{name}: {picture}"
            assert not picture["alt"].endswith(".png"), f"{name}: {picture}"
            assert picture.get("loading") == "lazy", f"{name}: {picture}"


def test_pages_are_valid(site, pages):
    """By the algorithm with which browsers read HTML: nothing that they would have to mend."""
    assert JustHTML("<!doctype html><p>a</b>", collect_errors=True).errors  # it would tell
    for name in [name for name in pages if not name.startswith("_static/")]:  # parts of pages, the theme's
        text = (site / name).read_text(encoding="utf-8")
        found = JustHTML(text, collect_errors=True, sanitize=False).errors
        assert not found, f"{name}: {found[:3]}"


def test_pages_are_small(site):
    for path in site.rglob("*.html"):
        assert path.stat().st_size < LARGEST_BYTES, path


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *about):
            """Nothing is said of what is asked."""

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("needs chromium or google-chrome (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """Opens a page; what the browser complains of goes to its `faults`."""
    contexts = []

    def opened(name: str, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        # Nothing is fetched from elsewhere, so that the site can be read without a network.
        context.route(lambda url: not url.startswith(address), lambda route: route.abort())
        page = context.new_page()
        page.faults, page.cut_off = [], []

        def failed(request) -> None:
            if request.failure == "net::ERR_ABORTED":  # the test itself has gone on to the next page
                page.cut_off.append(request.url)
            else:
                page.faults.append(f"cannot load {request.url}: {request.failure}")

        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("requestfailed", failed)
        page.goto(f"{address}/{name}")
        page.wait_for_load_state("load")
        return page

    yield opened
    for context in contexts:
        context.close()


def test_every_page_opens_without_a_complaint_on_a_phone_too(opened, pages):
    page = opened("index.html", viewport=PHONE)
    for name in pages:
        page.goto(f"{page.url.split('/', 3)[0]}//{page.url.split('/')[2]}/{name}")
        page.wait_for_load_state("load")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], f"{name} is {wide} pixels wide on a phone"
    page.faults += [f"cannot load {url}" for url in page.cut_off if not page.request.get(url).ok]
    assert not page.faults, page.faults[:10]


def test_the_search_finds_without_a_server(opened):
    page = opened("search.html?q=all-reduce")
    page.wait_for_selector("#search-results li a")
    assert "all" in page.inner_text("#search-results").lower()


def test_the_theme_turns_dark_and_figures_stay_on_white(opened):
    page = opened("notebooks/10_scoreboard.html", color_scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, ground[4:-1].split(","))) < 80, f"dark, but {ground}"
    figure = page.evaluate("getComputedStyle(document.querySelector('.cell_output img')).backgroundColor")
    assert figure == "rgb(255, 255, 255)"
