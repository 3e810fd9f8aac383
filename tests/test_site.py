"""The site: built from the committed outputs, complete, without a broken link, and drawn in a real browser on a desk and on a phone."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("sphinx_book_theme", reason="the extra `site` is not installed")

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(
    p
    for p in NBS.rglob("*.ipynb")
    if re.match(r"[0-9]_\w+/[^/]+$|results/|solutions/", p.relative_to(NBS).as_posix())
    and not p.name.startswith(("_", "."))
    and ".ipynb_checkpoints" not in p.parts
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: apt-get install chromium, and run again"
)


class Page(HTMLParser):
    "Links, pictures and anchors of a page, and its text outside code."

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[dict] = []
        self.ids: set[str] = set()
        self.prose: list[str] = []
        self.code = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        self.ids.update(filter(None, (facts.get("id"), facts.get("name"))))
        if tag == "a" and facts.get("href"):
            self.links.append(facts["href"])
        if tag == "img":
            self.pictures.append(facts)
        self.code += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag):
        self.code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if not self.code:
            self.prose.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The folder of the built pages. Sphinx ends with an error at the first warning."
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, ROOT / "site" / "build.py", folder],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    found = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    return {p.relative_to(site).as_posix(): Page(p) for p in found}


def page_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix(".html").as_posix()


def test_every_notebook_has_a_page_in_the_order_of_the_book(pages):
    from kd_notes.runner.notebooks import open_book
    from kd_notes.runner.order import read_order

    missing = [page_of(p) for p in NOTEBOOKS if page_of(p) not in pages]
    assert not missing and len(NOTEBOOKS) > 100
    order = [
        f"nbs/{lesson.name}.html" for part in read_order(open_book(ROOT)) for lesson in part.lessons
    ]
    listed = [link.split("#")[0] for link in pages["index.html"].links]
    places = [listed.index(page) for page in order]
    assert places == sorted(places)


def test_no_page_is_empty_and_no_formula_is_left_as_text(pages):
    short, raw = [], []
    for name, page in pages.items():
        text = "".join(page.prose)
        if name not in ("genindex.html", "search.html") and len(text.split()) < 60:
            short.append(name)
        if "$$" in text:
            raw.append(name)
    assert not short and not raw


def test_no_table_is_left_as_text(pages):
    "Tables in the outputs of code, too, are tables: their bars and dashes are no prose."
    raw = [
        name
        for name, page in pages.items()
        if re.search(r"\| ?(?:-{3,}|[—–]) ?\|", "".join(page.prose))
    ]
    assert not raw


def broken_links(site: Path, pages: dict[str, Page]) -> list[str]:
    "Links inside the site that lead to no file, or to no place on a page."
    broken = []
    for name, page in pages.items():
        for link in page.links:
            target, _, place = unquote(link).partition("#")
            if re.match(r"[a-z]+:|//", link):
                continue
            file = os.path.normpath(os.path.join(os.path.dirname(name), target)) if target else name
            if not (site / file).exists():
                broken.append(f"{name}: {link}")
            elif place and file in pages and place not in pages[file].ids:
                broken.append(f"{name}: {link}")
    return broken


def test_no_link_inside_the_site_is_broken(site, pages):
    assert not (found := broken_links(site, pages)), found[:20]


def test_a_broken_link_is_seen(site, pages, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text('<a href="nowhere.html">x</a><a href="index.html#nowhere">y</a>')
    assert len(broken_links(site, {"bad.html": Page(bad), "index.html": pages["index.html"]})) == 2


def figures_of(path: Path) -> int:
    "Figures in the committed outputs of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    kinds = [o.get("data", {}).keys() for c in cells for o in c.get("outputs", [])]
    return sum("image/png" in kind or "image/svg+xml" in kind for kind in kinds)


def test_every_figure_is_shown_and_described(site, pages):
    "As many pictures as in the committed outputs; each has a file and a description."
    missing = []
    for path in NOTEBOOKS:
        name = page_of(path)
        shown = [p for p in pages[name].pictures if "logo" not in p.get("class", "")]
        if len(shown) < figures_of(path):
            missing.append(name)
        for picture in shown:
            file = picture["src"]
            if not file.startswith("data:"):
                if not (
                    site / os.path.normpath(os.path.join(os.path.dirname(name), file))
                ).is_file():
                    missing.append(f"{name}: {file}")
            alt = picture.get("alt", "")
            if not alt.strip() or alt == file:  # without a description Sphinx takes the address
                missing.append(f"{name}: a picture without description")
    assert not missing
    assert sum(map(figures_of, NOTEBOOKS)) > 40


def test_the_download_is_the_notebook_of_the_repository(site):
    for path in NOTEBOOKS[:3]:
        assert (site / "_sources" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_the_library_has_its_reference(site):
    "Each public function stands there with its signature and docstring."
    text = (site / "api" / "losses.html").read_text(encoding="utf-8")
    assert 'id="forward-kl"' in text and "reverse_kl" in text


# --- in a browser -----------------------------------------------------------------------------------------------------------------

CHECK = """<!doctype html><body><pre id="out">not finished</pre><script>
const wait = ms => new Promise(done => setTimeout(done, ms));
async function open_page(url, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "900px"; frame.style.border = "0";
  document.body.appendChild(frame);
  await new Promise(done => { frame.onload = done; frame.src = url; });
  return frame;
}
async function measure(url, width) {
  const frame = await open_page(url, width), page = frame.contentDocument;
  const wanted = page.querySelectorAll("span.math, div.math").length;
  for (let i = 0; i < 60 && page.querySelectorAll("mjx-container").length < wanted; i++) await wait(250);
  const root = page.documentElement;
  const found = { url, width, inner: root.clientWidth, scroll: root.scrollWidth, wanted,
    drawn: page.querySelectorAll("mjx-container svg").length,
    failed: page.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    copies: page.querySelectorAll(".kd-copy").length,
    sorters: page.querySelectorAll(".kd-sort").length };
  frame.remove();
  return found;
}
async function search(word) {
  const frame = await open_page("search.html?q=" + word, 1280), page = frame.contentDocument;
  for (let i = 0; i < 80 && page.querySelectorAll("#search-results li").length < 3; i++) await wait(250);
  return [...page.querySelectorAll("#search-results li a")].map(a => a.textContent);
}
async function sorted(url) {
  const frame = await open_page(url, 1280), page = frame.contentDocument;
  const tables = [...page.querySelectorAll("table")].map(table => {
    const column = number => [...table.tBodies[0].rows].map(row => row.cells[number].textContent.trim());
    const heads = [...table.tHead.rows[0].cells];
    return heads.map((head, number) => {
      const found = { head: head.textContent, before: column(number) };
      for (const way of ["up", "down"]) {
        head.querySelector(".kd-sort").click();
        found[way] = column(number);
        found[way + " is told"] = head.getAttribute("aria-sort");
      }
      return found;
    });
  });
  const numbers = NUMBERS.map(text => frame.contentWindow.eval(`sortNumber(${JSON.stringify(text)})`));
  frame.remove();
  return { tables, numbers };
}
async function move(url) {
  const frame = await open_page(url, 390), page = frame.contentDocument;
  const found = [...page.querySelectorAll(".kd-frames")].map(slides => {
    const slider = slides.querySelector("input"), frames = [...slides.querySelectorAll(".kd-frame")];
    const shown = [];
    for (let number = 0; number <= Number(slider.max); number++) {
      slider.value = number; slider.dispatchEvent(new Event("input"));
      const visible = frames.filter(e => !e.hidden);
      shown.push([frames.indexOf(visible[0]), visible.length, slides.querySelector("output").textContent]);
    }
    return { name: slider.getAttribute("aria-label"), shown };
  });
  frame.remove();
  return found;
}
addEventListener("unhandledrejection", event => {
  document.getElementById("out").textContent = String(event.reason.stack || event.reason);
});
(async () => {
  const out = { pages: [], hits: [], sorted: await sorted("nbs/results/claims.html"), sliders: {} };
  for (const url of SLIDERS) out.sliders[url] = await move(url);
  for (const url of PAGES) for (const width of [1280, 390]) out.pages.push(await measure(url, width));
  out.hits = await search("temperature");
  document.getElementById("out").textContent = JSON.stringify(out);
  document.title = "finished";
})();
</script>"""
LOOKED_AT = [
    "index.html",
    "nbs/notation.html",
    "nbs/glossary.html",
    "nbs/1_idea/01_why_distil.html",
    "nbs/1_idea/02_dark_knowledge.html",
    "nbs/4_probabilities/01_divergences.html",
    "nbs/5_own_words/03_minillm.html",
    "nbs/5_own_words/13_learning_rates.html",
    "nbs/results/claims.html",
    "nbs/results/landscape.html",
    "nbs/results/minillm_main.html",
    "nbs/results/minillm_scaling.html",
    "nbs/results/stepwise_data_efficiency.html",
    "CONTRIBUTING.html",
    "api/losses.html",
]


# Every page with a slider, and what its sliders move.
SLIDERS = {
    "nbs/1_idea/02_dark_knowledge.html": ["temperature"],
    "nbs/1_idea/03_hundred_lines.html": ["words so far"],
    "nbs/1_idea/04_what_a_divergence_rewards.html": ["β"],
    "nbs/2_playground/14b_diagrams.html": ["place"],
    "nbs/5_own_words/13_learning_rates.html": ["learning rate"],
}
# What a cell of a table counts as when its column is sorted; None: as text.
NUMBERS = {
    "12.5 %": 12.5,
    "−1.0 [−3.1, 1.1] points": -1,
    "+0.5": 0.5,
    "1,234": 1234,
    "1e-05": 1e-5,
    "2 min 30 s / 1 h 2 min": 150,
    "1 h 2 min": 3720,
    "3 supported, 4 undecided": 3,
    "nli: 15.7": None,
    "supported": None,
}


@pytest.fixture(scope="module")
def seen(site, tmp_path_factory) -> dict:
    "What a headless Chromium measures on some pages, 1280 and 390 pixels wide."
    script = CHECK.replace("PAGES", json.dumps(LOOKED_AT)).replace(
        "SLIDERS", json.dumps(list(SLIDERS))
    )
    (site / "check.html").write_text(script.replace("NUMBERS", json.dumps(list(NUMBERS))))
    handler = functools.partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/check.html"
        profile = tmp_path_factory.mktemp("profile")
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1400,1000",
        ]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=600000", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    finally:
        server.shutdown()
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1].startswith("{"), (found and found[1], done.stderr[-1500:])
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        "Keep the log of the tests clean."


@needs_browser
def test_no_page_scrolls_sideways(seen):
    wide = [p for p in seen["pages"] if p["scroll"] > p["inner"]]
    assert len(seen["pages"]) == 2 * len(LOOKED_AT) and not wide


@needs_browser
def test_formulas_are_drawn_without_a_network(seen):
    bad = [p for p in seen["pages"] if p["drawn"] < p["wanted"] or p["failed"]]
    assert not bad and sum(p["wanted"] for p in seen["pages"]) > 50


@needs_browser
def test_code_can_be_copied(seen):
    assert next(p for p in seen["pages"] if "02_dark" in p["url"])["copies"] > 5


@needs_browser
@pytest.mark.parametrize("url", SLIDERS)
def test_a_slider_shows_one_picture_after_the_other(seen, url):
    assert [slider["name"] for slider in seen["sliders"][url]] == SLIDERS[url]
    for slider in seen["sliders"][url]:
        numbers, visible, labels = zip(*slider["shown"])
        assert list(numbers) == list(range(len(numbers))) and set(visible) == {1}
        assert len(set(labels)) == len(labels) > 2


def test_every_slider_is_tested(pages, site):
    with_slider = {n for n in pages if 'class="kd-frames"' in (site / n).read_text("utf-8")}
    assert with_slider == set(SLIDERS)


@needs_browser
def test_a_click_sorts_a_table(seen):
    "Both tables of the claims register, by each of their columns: the same cells in order, and back."
    assert len(seen["sorted"]["tables"]) == 2
    for column in [column for table in seen["sorted"]["tables"] for column in table]:
        assert sorted(column["up"]) == sorted(column["down"]) == sorted(column["before"])
        assert (column["up is told"], column["down is told"]) == ("ascending", "descending")
        filled = [[cell for cell in column[way] if cell not in ("", "–")] for way in ("up", "down")]
        empty = len(column["up"]) - len(filled[0])
        assert set(column["up"][len(filled[0]) :]) <= {"", "–"} and empty < len(column["up"])
        words = [cell for cell in filled[0] if not re.match(r"\W*\d", cell)]
        down = [cell for cell in filled[1] if not re.match(r"\W*\d", cell)]
        letters = [[re.sub(r"\W", "", cell).lower()[:1] for cell in way] for way in (words, down)]
        assert letters == [sorted(letters[0]), sorted(letters[1], reverse=True)]
    [claim, *_] = seen["sorted"]["tables"][0]
    assert claim["head"] == "claim" and claim["up"] != claim["before"]


@needs_browser
def test_the_tables_of_the_landscape_can_be_sorted_too(seen):
    assert next(p for p in seen["pages"] if "landscape" in p["url"])["sorters"] > 5


@needs_browser
def test_cells_that_begin_with_a_number_are_sorted_as_numbers(seen):
    assert seen["sorted"]["numbers"] == list(NUMBERS.values())


@needs_browser
def test_the_search_finds_temperature(seen):
    assert any("Dark knowledge" in hit for hit in seen["hits"]), seen["hits"]
