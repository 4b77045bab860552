"""The leaderboard: everything is in one file, what models wrote can't act, and its commands make the same cells."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import initialize_config_dir
from report_data import COMMIT, HOSTILE, REASON, write_results

from kvbench.budget import Budget
from kvbench.cell import Cell, ModelConfig
from kvbench.config import build_plugin, convert, register
from kvbench.list import conf_folder
from kvbench.report.aggregate import aggregate
from kvbench.report.leaderboard import OF_METRIC, in_script, leaderboard, page, payload
from kvbench.report.remake import command

METHODS = {"snapkv": 0.2, "kivi": 0.05, "vector(base=keydiff)": 0.02, "<img src=x onerror=alert(2)>": 0.3}


def cells_with_known_methods(results: Path) -> None:
    write_results(results, n=40, methods={name: METHODS[name] for name in list(METHODS)[:3]}, budgets=("0.1", "0.5"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaderboard") / "results"
    cells_with_known_methods(folder)
    # A user's own texts: a name of a model, and a commit's neighbour.
    for header in folder.glob("niah/*/snapkv-0.5-*/header.json"):
        facts = json.loads(header.read_text())
        facts["about"]["model"]["weights"] = HOSTILE
        facts["segments"][0]["hardware"]["cpu"] = HOSTILE
        header.write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def html(results: Path) -> str:
    return leaderboard(results)


# ---- the file


class Elements(HTMLParser):
    """Every tag with its attributes, and the text within script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.texts.append((self.tags[-1][0], data))


def test_it_asks_nothing_of_any_network(html: str) -> None:
    found = Elements(html)
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "video", "audio"), tag
        assert not {"src", "srcset", "action", "data", "background", "style"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    style = "".join(text for tag, text in found.texts if tag == "style")
    assert not re.search(r"@import|url\(|@font-face", style)
    assert [tag for tag, _ in found.tags].count("script") == 2
    script = found.texts[-1][1]
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|import\(|innerHTML|insertAdjacentHTML|eval\(", script)


def test_its_policy_allows_its_own_script_and_style_alone(html: str) -> None:
    found = Elements(html)
    policy = next(a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for kind, text in (found.texts[0], found.texts[-1]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_data_can_not_leave_their_element() -> None:
    value = {"</script>": ["<!--", "a&b", "\u2028\u2029", HOSTILE, "]]>", '"\\'], "n": 1.5, "none": None}
    text = in_script(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_the_data_are_the_table(results: Path, html: str) -> None:
    found = json.loads(next(text for tag, text in Elements(html).texts if tag == "script"))
    table = aggregate(results)
    assert len(found["cells"]) == table["cell"].nunique()
    for cell in found["cells"]:
        for metric, values in cell["metrics"].items():
            row = table[(table["cell"] == cell["cell"]) & (table["metric"] == metric)].iloc[0]
            shown = dict(zip(OF_METRIC, values, strict=True))
            assert shown["n"] == row["n"]
            if row["mean"] == row["mean"]:
                assert shown["mean"] == pytest.approx(row["mean"], rel=1e-4, abs=1e-12)
        full = found["cells"][cell["full"]]
        assert full["method"] == "full"
        assert (full["task"], full["protocol"]) == (cell["task"], cell["protocol"])
    assert {cell["status"] for cell in found["cells"]} == {"done", "failed", "infeasible"}
    assert REASON in {cell["reason"] for cell in found["cells"]}


def test_examples_are_few_and_clipped(results: Path) -> None:
    found = payload(aggregate(results), results, "full", examples=2, characters=10)
    assert max(len(cell["examples"]) for cell in found["cells"]) == 2
    answers = [one["answer"] for cell in found["cells"] for one in cell["examples"] if "answer" in one]
    assert all(len(answer) <= 10 or re.fullmatch(r".{10} … \(\d+ characters\)", answer) for answer in answers)
    assert any("…" in answer for answer in answers)
    assert len(page(payload(aggregate(results), results, "full", 0, 0))) < len(page(found))


def test_what_is_remade_has_its_baseline(results: Path) -> None:
    found = payload(aggregate(results, baseline="snapkv"), results, "snapkv", examples=0, characters=0)["cells"]
    for cell in found:
        beside = [found[i]["method"] for i in cell["beside"]]
        assert set(beside) == {"full", "snapkv"} - {cell["method"]} - (
            {"snapkv"} if cell["method"] == "full" else set()
        )
        base = "full" if cell["method"] == "full" else "snapkv"
        assert cell["again"] == f"python scripts/aggregate.py remade --baseline {base}"


def test_it_needs_no_torch() -> None:
    code = "import sys, kvbench.report.leaderboard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_script_writes_it(results: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "leaderboard.py"
    out = tmp_path / "page.html"
    subprocess.run([sys.executable, script, results, "--out", out, "--examples", "1"], check=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    bad = subprocess.run([sys.executable, script, tmp_path / "nothing", "--out", out], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("leaderboard: ")
    assert bad.stderr.count("\n") == 1


# ---- its commands

SMALL = ModelConfig(name="smollm2-135m-q4_1", path="embedded:smollm2-135m-q4_1")
QWEN = ModelConfig(name="qwen3-8b", path="Qwen/Qwen3-8B", template={"enable_thinking": False}, revision="0123abc")
OWN = ModelConfig(name="my model", path="/disk/a b", dtype="float16", chat=False, weights="random", template={"a": "x"})


@pytest.mark.parametrize(
    ("model", "method", "budget", "task", "rest"),
    [
        (SMALL, ("snapkv", {}), "0.1", ("niah", {}), {}),
        (SMALL, ("full", {}), "0.1", ("lm", {"context": 512}), {"generate": False, "seed": 7}),
        (QWEN, ("vector", {"base": "keydiff", "router": "paper"}), "64MiB", ("niah", {"needles": 4}), {}),
        (QWEN, ("kivi", {"decode": True}), "0.25", ("gsm8k", {}), {"protocol": "aware"}),
        (
            OWN,
            ("compose", {"tiers": ["exact", "int4"], "scorer_options": {"window": 8}}),
            "0.9r",
            ("niah", {"context": 1024, "depths": [0.0, 0.5, 1.0]}),
            {"protocol": "aware"},
        ),
        (OWN, ("keydiff", {}), "128tok", ("lm_eval", {"name": "arc_easy", "shots": 2}), {}),
    ],
)
def test_the_command_makes_the_same_cell(
    model: ModelConfig, method: tuple[str, Any], budget: str, task: tuple[str, Any], rest: dict[str, Any]
) -> None:
    plugins = build_plugin("methods", *method), build_plugin("tasks", *task)
    cell = Cell(model, plugins[0], Budget.parse(budget), plugins[1], **rest)
    about = {"model": {"compute": "float32", "prefill_chunk": 4096}}
    words = shlex.split(command({"identity": cell.identity(), "about": about}, 16, "my 'own' results"))
    assert words[:3] == ["python", "-m", "kvbench.run"]
    register()
    with initialize_config_dir(str(conf_folder().absolute()), version_base="1.3"):
        run = convert(hydra.compose("config", words[3:]))
    assert run.cell.identity() == cell.identity()
    assert run.cell.digest == cell.digest
    assert (run.settings.limit, str(run.settings.results)) == (16, "my 'own' results")
    assert (run.cell.model.compute, run.cell.model.prefill_chunk) == ("float32", 4096)


def test_a_plain_command_is_as_one_writes_it() -> None:
    cell = Cell(SMALL, build_plugin("methods", "snapkv", {}), Budget.parse("0.1"), build_plugin("tasks", "niah", {}))
    assert command({"identity": cell.identity(), "about": {"model": {}}}, 8, "remade") == (
        "python -m kvbench.run method=snapkv budget=0.1 task=niah protocol=blind seed=0 generate=true "
        "model=smollm2-135m limit=8 results=remade"
    )


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install -e .[dev])")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """The page in a browser, and everything that must not have happened there."""

    def __init__(self, browser: Any, file: Path, fragment: str = "", **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | options))
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.asked: list[str] = []
        self.page.goto(file.as_uri() + fragment)

    def column(self, number: int) -> list[str]:
        return [text.strip() for text in self.rows().locator(f":nth-child({number})").all_inner_texts()]

    def rows(self) -> Any:
        return self.page.locator("#body > tr")

    def names(self) -> list[str]:
        return self.page.locator("#body .link").all_inner_texts()

    def shows(self, count: int) -> None:
        """Waits until the table has so many rows."""
        self.until(lambda: self.rows().count() == count)

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits for a frame that `holds`. Not in the page: its policy forbids what drivers would evaluate there."""
        for _ in range(100):
            if holds():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("waited for 5 s")

    def sorted_by(self, name: str, way: str) -> None:
        """Waits until the header says so, and no other one."""
        header = self.page.locator(f'th[aria-sort="{way}"]')
        self.until(lambda: header.count() == 1 and header.inner_text().startswith(name))
        assert self.page.locator("th[aria-sort]").count() == 1

    def cells(self) -> list[dict[str, Any]]:
        """The cells of the rows, as they stand."""
        return self.page.evaluate("[...document.querySelectorAll('#body > tr')].map((row) => row.cell)")


@pytest.fixture
def opened(browser: Any, html: str, tmp_path: Path) -> Iterator[Any]:
    file = tmp_path / "leaderboard.html"
    file.write_text(html, encoding="utf-8")
    made: list[Opened] = []

    def open_it(fragment: str = "", **options: Any) -> Opened:
        made.append(Opened(browser, file, fragment, **options))
        return made[-1]

    yield open_it
    for one in made:
        assert one.trouble == []
        assert all(url.startswith(file.as_uri()) for url in one.asked), one.asked
        assert one.page.locator("img, iframe, #body script, dialog script").count() == 0
        one.context.close()


def test_columns_sort_by_click_and_key(opened: Any) -> None:
    view = opened()
    header = view.page.get_by_role("columnheader", name="Share")
    header.get_by_role("button").click()
    view.sorted_by("Share", "ascending")
    shares = [cell["share"] for cell in view.cells()]
    numbers = [share for share in shares if share is not None]
    assert numbers == sorted(numbers)
    assert shares[: len(numbers)] == numbers, "what is missing comes last"
    header.get_by_role("button").press("Enter")
    view.sorted_by("Share", "descending")
    numbers = [cell["share"] for cell in view.cells() if cell["share"] is not None]
    assert numbers == sorted(numbers, reverse=True)
    view.page.get_by_role("columnheader", name="Score").get_by_role("button").press("Space")
    view.sorted_by("Score", "descending")
    scores = [cell["metrics"]["score"]["mean"] for cell in view.cells() if "score" in cell["metrics"]]
    assert [s for s in scores if s is not None] == sorted((s for s in scores if s is not None), reverse=True)
    for name in ("Method", "Budget", "Task", "Protocol", "Held, MiB", "n", "Family", "Trust", "Marks", "Δ full"):
        button = view.page.get_by_role("columnheader", name=name, exact=True).get_by_role("button")
        button.click()
        view.sorted_by(name, "descending" if name in ("n", "Δ full") else "ascending")


def test_no_seconds_are_a_column(opened: Any) -> None:
    view = opened()
    names = " ".join(view.page.get_by_role("columnheader").all_inner_texts()).lower()
    assert not re.search(r"second|ttft|tpot|latency|energy|joule|\bs\b|\bms\b", names)
    view.page.locator("#body .link").first.click()
    assert "nothing is ranked by them" in view.page.locator("dialog").inner_text()


def test_filters_and_the_address(opened: Any) -> None:
    view = opened()
    everything = view.cells()
    filters = view.page.get_by_role("search")
    filters.get_by_label("Task").select_option("niah")
    filters.get_by_label("Protocol").select_option("blind")
    wanted = [c for c in everything if (c["task"], c["protocol"]) == ("niah", "blind")]
    view.shows(len(wanted))
    assert view.page.get_by_role("status").inner_text() == f"{len(wanted)} of {len(everything)} cells"
    filters.get_by_label("Family").select_option("codec")
    view.shows(sum(c["family"] == "codec" for c in wanted))
    filters.get_by_label("Family").select_option("")
    filters.get_by_label("Training").select_option("fitted per model")
    view.shows(sum(c["training"] == "fitted per model" for c in wanted))
    filters.get_by_label("Training").select_option("")
    filters.get_by_label("Budget").select_option("0.1")
    view.shows(sum(c["budget"] == "0.1" for c in wanted))
    filters.get_by_label("Budget").select_option("")
    filters.get_by_label("from").fill("20")
    filters.get_by_label("to", exact=True).fill("60")
    view.shows(sum(c["share"] is not None and 0.2 <= c["share"] <= 0.6 for c in wanted))
    filters.get_by_label("from").fill("")
    filters.get_by_label("to", exact=True).fill("")
    filters.get_by_role("searchbox", name="Method").fill("KEYDIFF vec")
    view.shows(2)
    assert set(view.names()) == {"vector(base=keydiff)"}
    again = opened(view.page.evaluate("location.hash"))
    assert again.names() == view.names()
    assert again.page.get_by_role("search").get_by_label("Task").input_value() == "niah"
    view.page.get_by_role("button", name="Reset").click()
    view.shows(len(everything))
    assert view.page.evaluate("location.hash") in ("", "#")


def test_the_metric_changes_table_and_plot(opened: Any) -> None:
    view = opened("#task=niah&protocol=blind")
    assert view.page.locator("figure svg").count() == 1
    view.page.get_by_role("radio", name="NLL").check()
    plot = view.page.locator("figure svg")
    view.until(lambda: "NLL, nats/token (lower is better)" in (plot.text_content() or ""))
    means = [cell["metrics"]["answer_nll"]["mean"] for cell in view.cells()]
    numbers = [mean for mean in means if mean is not None]
    assert numbers == sorted(numbers), "the best first"
    view.page.get_by_role("radio", name="KL to full").check()
    view.until(lambda: "KL to full, nats (log, lower is better)" in (plot.text_content() or ""))
    assert not view.page.get_by_role("columnheader", name="Δ full", exact=True).is_visible()


def test_a_cell_opens_and_closes(opened: Any) -> None:
    view = opened("#task=niah&protocol=blind&q=snapkv")
    button = view.page.locator("#body .link").first
    button.focus()
    button.press("Enter")
    dialog = view.page.get_by_role("dialog")
    shown = dialog.inner_text()
    cell = view.cells()[0]
    wanted = [cell["cell"], cell["folder"], COMMIT, "torch 2.13.0+cpu", "data-of-niah", "The full cache's", "exact"]
    wanted += ["python -m kvbench.run method=snapkv", "scripts/aggregate.py"]
    for text in wanted:
        assert text in shown, text
    assert HOSTILE in shown, "what a model wrote, as it wrote it"
    assert f"cell={cell['cell']}" in view.page.evaluate("location.hash")
    dialog.get_by_role("button", name="Next cell").click()
    assert view.cells()[1]["cell"] in dialog.inner_text()
    view.page.keyboard.press("Escape")
    view.page.wait_for_selector("dialog", state="hidden")
    assert view.page.evaluate("document.activeElement.className") == "link"
    view.page.keyboard.press("ArrowDown")
    assert view.page.evaluate("document.activeElement.closest('tr').rowIndex") == 2
    view.rows().nth(1).locator("td").nth(2).click()
    assert dialog.is_visible()


def test_an_address_opens_a_cell(opened: Any) -> None:
    cell = opened().cells()[3]
    view = opened(f"#cell={cell['cell']}")
    assert cell["folder"] in view.page.get_by_role("dialog").inner_text()


def test_a_thousand_cells(browser: Any, results: Path, tmp_path: Path) -> None:
    """Rows come in two steps, and the panels of a plot are limited."""
    found = payload(aggregate(results), results, "full", examples=0, characters=0)
    once = found["cells"]
    found["cells"] = [
        c | {"cell": f"{c['cell']}-{i}", "seed": i, "full": None, "beside": []} for c in once for i in range(24)
    ]
    file = tmp_path / "big.html"
    file.write_text(page(found), encoding="utf-8")
    view = Opened(browser, file)
    assert view.rows().count() == 250
    assert view.page.locator("figure").count() == 12
    view.page.get_by_role("button", name="Show all").click()
    view.shows(len(found["cells"]))
    assert view.page.evaluate("document.activeElement.closest('tr').rowIndex") == 251
    assert view.trouble == []
    view.context.close()


def test_what_failed_says_why(opened: Any) -> None:
    view = opened()
    for status in ("failed", "infeasible"):
        place = next(i for i, cell in enumerate(view.cells()) if cell["status"] == status)
        assert f"{status}: {REASON}" in view.rows().nth(place).inner_text()
        view.page.locator("#body .link").nth(place).click()
        assert f"{status}: {REASON}" in view.page.locator("dialog .warn").inner_text()
        view.page.keyboard.press("Escape")


def test_the_plot_by_keyboard_and_pointer(opened: Any) -> None:
    view = opened("#task=niah&protocol=blind")
    points = view.page.locator("figure .point")
    assert view.page.locator('figure .point[tabindex="0"]').count() == 1, "one stop of the Tab key"
    points.first.focus()
    assert view.page.locator("#tip").is_visible()
    before = view.page.locator("#tip").inner_text()
    view.page.keyboard.press("ArrowRight")
    assert view.page.locator("#tip").inner_text() != before
    view.page.keyboard.press("Enter")
    assert view.page.get_by_role("dialog").is_visible()
    view.page.keyboard.press("Escape")
    assert "point" in view.page.evaluate("document.activeElement.getAttribute('class')")
    view.page.mouse.move(1, 1)
    points.last.hover(force=True)
    assert "full" in view.page.locator("#tip").inner_text()
    points.last.click(force=True)
    assert view.page.get_by_role("dialog").get_by_role("heading", level=2).inner_text() == "full at 1"


def test_hostile_texts_are_inert(opened: Any, results: Path) -> None:
    view = opened()
    for i in range(view.rows().count()):
        view.page.locator("#body .link").nth(i).click()
        view.page.keyboard.press("Escape")
    assert view.page.evaluate("document.querySelectorAll('[onerror], [src]').length") == 0
    assert view.page.locator("script").count() == 2
    assert view.page.evaluate("window.hurt") is None
    # The policy holds even for a script that gets as far as into the page.
    refused = view.page.evaluate(
        "(() => { try { document.createElement('p').innerHTML = '<b>x</b>'; return false } catch { return true } })()"
    )
    assert refused
    view.trouble[:] = [line for line in view.trouble if "TrustedHTML" not in line]  # which the browser says aloud


def test_light_dark_and_narrow(opened: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened(color_scheme=scheme).page for scheme in ("light", "dark"))
    assert light.evaluate(colour) != dark.evaluate(colour)
    toggle = light.get_by_role("button", name="Theme")
    toggle.click()
    assert toggle.inner_text() == "Theme: light"
    toggle.click()
    assert light.evaluate(colour) == dark.evaluate(colour)
    narrow = opened(viewport={"width": 360, "height": 740}).page
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 360
    narrow.locator("#body .link").first.click()
    assert narrow.evaluate("document.querySelector('dialog').scrollWidth") <= 360


CONTRASTS = """() => {
  const probe = document.body.appendChild(document.createElement("p"));
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (name) => {
    probe.style.color = `var(--${name})`;
    canvas.fillStyle = getComputedStyle(probe).color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((x) => x / 255)
      .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const names = ["ink", "soft", "link", "mark", "strong", "reference", "scorer", "allocator", "codec", "router",
    "merging", "pattern", "retrieval"];
  return Object.fromEntries(names.map((name) => [name, Math.min(ratio(name, "page"), ratio(name, "raised"))]));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened: Any, scheme: str) -> None:
    """Of text 4.5, of marks and edges 3 (WCAG 2.2 AA)."""
    found = opened(color_scheme=scheme).page.evaluate(CONTRASTS)
    for name, ratio in found.items():
        assert ratio >= (4.5 if name in ("ink", "soft", "link", "mark") else 3.0), (name, ratio)


def test_controls_have_names(opened: Any) -> None:
    view = opened()
    nameless = view.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [tabindex='0'], [role=group]")]
          .filter((one) => !one.textContent.trim() && !one.labels?.length)
          .filter((one) => !one.getAttribute("aria-label") && !one.getAttribute("aria-labelledby"))
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []
