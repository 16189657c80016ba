"""The HTML report as a reader gets it: in a browser, on a desk and a phone, by day and by night."""

from __future__ import annotations

import shutil

import pytest
from sample_record import sample
from test_reports import evil_record

from peftcheck import report_html

# Contrast of text to what lies behind it, by WCAG 2: relative luminance, the backgrounds composed up the tree.
CONTRAST = """() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, low) => low.map((v, i) => i == 3 ? 1 : top[i] * top[3] + v * (1 - top[3]));
  const paint = e => parse(getComputedStyle(e).backgroundColor);
  const behind = e => { let stack = []; for (; e; e = e.parentElement) stack.push(paint(e));
    return stack.reverse().reduce((low, top) => over(top, low), paint(document.body)); };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const worst = {};
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg, script, .skip") || !e.getClientRects().length) continue;
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05), name = e.tagName + "." + e.className;
    worst[name] = Math.min(worst[name] ?? 99, ratio);
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def chromium():
    """Start Debian's chromium; a missing browser is a failure, because a skipped test looks like a passed one."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is not on the PATH; install it (apt-get install chromium) to test the HTML report")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    """Write the sample report once."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_html.render(sample()), encoding="utf-8")
    return path


@pytest.fixture
def visit(chromium):
    """Open a file and hold everything the page said, asked for or threw."""
    contexts = []

    def open_page(path, width=1360, height=900, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme,
                                       reduced_motion="reduce")  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.heard = []
        page.on("console", lambda message: page.heard.append(message.text))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("dialog", lambda dialog: (page.heard.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.heard.append(request.url))
        page.goto(path.as_uri())
        page.heard.remove(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width, height", [(1360, 900), (390, 844)])
def test_the_page_stands_alone_and_fits_its_window(visit, report_file, width, height):
    page = visit(report_file, width, height)
    assert page.heard == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".banner .word").is_visible()
    assert "breaks 4 laws" in page.locator(".banner .sentence").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(visit, report_file, scheme):
    page = visit(report_file, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true; })")
    page.locator("#heat td.v").first.click()
    worst = page.evaluate(CONTRAST)
    squares = {
        "TD.p0",
        "TD.p2",
        "TD.p3",
        "TD.n",
        "TD.a",
        "A.",
        "SPAN.dot p1",
        "SPAN.badge violation",
        "SPAN.badge known",
    }
    assert squares <= worst.keys()
    assert not {name: ratio for name, ratio in worst.items() if ratio < 4.5}


def test_row_names_and_laws_stay_in_sight(visit, report_file):
    page = visit(report_file, 390, 844)
    box = page.locator("#heat").locator("xpath=..")
    name, law = page.locator("#heat tbody th").nth(12), page.locator("#heat .laws th").nth(12)
    box.evaluate("box => box.scrollTo(400, 150)")
    edges = box.bounding_box()
    assert abs(name.bounding_box()["x"] - edges["x"]) <= 2
    assert 0 <= law.bounding_box()["y"] - edges["y"] < 60
    assert box.evaluate("box => box.scrollLeft") == 400


def test_filters_leave_what_they_name(visit, report_file):
    page = visit(report_file)
    rows, columns = page.locator("#heat tbody tr:visible"), page.locator("#heat .laws th:visible")
    whole, laws = rows.count(), columns.count()
    page.fill("#find", "BOFT conv2d")
    assert rows.count() == 1 and "boft" in rows.first.inner_text()
    assert page.locator("#sweeps tbody tr:visible").count() == 5
    assert page.locator("#shown").inner_text() == f"1 of {whole} rows"
    page.fill("#find", "")
    page.check("#only")
    assert 0 < rows.count() < whole
    assert rows.count() == page.locator("#heat tbody tr[data-bad]").count()
    page.uncheck("#only")
    page.select_option("#group", label="safe_merge")
    assert columns.all_inner_texts() == ["agrees", "all_or_nothing", "atomic", "names", "rejects"]
    assert page.locator("#heat tbody tr").first.locator("td:visible").count() == 5
    assert page.locator("#heat .group th:not(.corner):visible").all_inner_texts() == ["safe_merge"]
    page.select_option("#group", label="all")
    assert columns.count() == laws and rows.count() == whole


def test_a_square_tells_its_case_and_leads_to_its_defect(visit, report_file):
    page = visit(report_file, 390, 844)
    assert page.locator("#panel").is_hidden()
    page.locator("#heat td.k").first.click()
    panel = page.locator("#panel")
    text = panel.inner_text()
    assert "merge.roundtrip on ia3" in text and "known, ratio 4.5e7 (float64)" in text and "Worst case" in text
    page.locator("#lead").click()
    card = page.locator(page.evaluate("location.hash"))
    assert card.is_visible() and "divides by s + 1e-8" in card.inner_text()
    page.keyboard.press("Escape")
    assert panel.is_hidden()
    page.locator("#heat td.p3").first.click()
    assert panel.is_visible() and page.locator("#lead").is_hidden()


def test_the_report_reads_without_its_script(chromium, report_file):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report_file.as_uri())
    assert page.locator("#heat tbody tr").count() > 30 and page.locator("#panel").is_hidden()
    assert page.locator(".tools").is_hidden() and page.locator(".copy").first.is_hidden()
    context.close()


def test_a_hostile_record_runs_nothing_and_asks_for_nothing(visit, tmp_path):
    path = tmp_path / "evil.html"
    path.write_text(report_html.render(evil_record()), encoding="utf-8")
    page = visit(path, 390, 844)
    page.locator("#heat td.v").first.click()
    page.fill("#find", "<script>")
    assert page.heard == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert "alert(1)" in page.locator(".sentence").inner_text()


def test_a_large_report_stays_usable(visit, tmp_path):
    path = tmp_path / "large.html"
    path.write_text(report_html.render(sample(20_000)), encoding="utf-8")
    page = visit(path)
    page.fill("#find", "lora.dora.option1 conv2d")
    assert page.locator("#heat tbody tr:visible").count() == 1 and page.heard == []
