from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import releases
from handheld import cli, records
from handheld.report import render

ARTIFACTS = Path(__file__).resolve().parents[1] / "build" / "test-artifacts"


def some(bundle=None):
    return [
        releases.record(bundle),
        releases.record(bundle, number=1, residency="stream", times=(80.0, 85.0, 90.0), peak=10**7),
        releases.record(
            bundle, number=2, noisy=("p5 to p95 spans 20%",), throttled=True,
            placement={"unet.0": {"cpu": 3, "npu": 10}},
        ),
        releases.record(bundle, number=3, status="failed", error="<b>memory & more</b>", passes=()),
    ]  # fmt: skip


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.plots = set(), set(), [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a":
            self.links.add(found["href"])
        self.plots += tag == "svg"
        self.loads += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


def test_every_number_links_to_a_record(tmp_path):
    made = releases.bundle(tmp_path / "b")
    page = Parsed(render(some(made), [made]))
    assert page.links
    assert all(link.removeprefix("#") in page.ids for link in page.links)
    assert page.plots >= 9


def test_nothing_is_loaded(tmp_path):
    made = releases.bundle(tmp_path / "b")
    text = render(some(made), [made])
    assert all(source.startswith("data:") for source in Parsed(text).loads)
    assert "<script" not in text
    assert not re.search(r"url\(|@import", text)


def test_text_is_escaped():
    text = render(some(), title="<script>alert(1)</script>")
    assert "<script>" not in text
    assert "&lt;b&gt;memory &amp; more&lt;/b&gt;" in text


def test_sections(tmp_path):
    made = releases.bundle(tmp_path / "b")
    text = render(some(made), [made], {some(made)[0].id: b"png"})
    for title in (
        "Time per picture",
        "Streaming against resident",
        "Peak memory",
        "Memory over time",
        "Heat",
        "Placement",
        "Pictures",
        "Estimate against measurement",
        "Records",
    ):
        assert f"{title}</h2>" in text
    assert "Not run on a phone" in text
    assert "throttled" in text


def test_command(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    for r in some():
        records.append(file, r)
    assert cli.run(["report", str(file), "-o", str(tmp_path / "r.html")]) == 0
    assert "4 records" in capsys.readouterr().out
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    file.write_text("")
    assert cli.run(["report", str(file), "-o", str(tmp_path / "x.html")]) == 2
    assert not (tmp_path / "x.html").exists()


CONTRAST = """
const lum = c => { const f = c.map(v => { v /= 255; return v <= .04045 ? v / 12.92 :
  Math.pow((v + .055) / 1.055, 2.4); }); return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
const rgb = s => { const m = s.match(/[\\d.]+/g).map(Number); return m; };
const ground = e => { for (; e; e = e.parentElement) {
  const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
const bad = []; let seen = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) { const e = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  const a = lum(rgb(style.color).slice(0, 3)), b = lum(ground(e));
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  seen++;
  if (ratio < (large ? 3 : 4.5))
    bad.push([e.tagName, ratio, walk.currentNode.textContent.slice(0, 40)]); }
return [seen, bad];
"""
DRAWN = """
return [...document.querySelectorAll('svg.plot')].map(s => { const box = s.getBoundingClientRect();
  const marks = [...s.querySelectorAll('circle,rect,path,line:not(.grid)')].filter(m => {
    const b = m.getBBox(); const c = getComputedStyle(m);
    const painted = (c.fill !== 'none' && c.fill !== 'rgba(0, 0, 0, 0)') || c.stroke !== 'none';
    return painted && (b.width > 0 || b.height > 0); });
  return [box.width, box.height, marks.length]; });
"""


@pytest.mark.system
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)])
def test_in_a_browser(tmp_path, scheme, width, height):
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("chromium and chromium-driver are not installed")
    from selenium import webdriver

    made = releases.bundle(tmp_path / "b")
    page = tmp_path / "report.html"
    page.write_text(render(some(made), [made]), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        chrome.get(page.as_uri())
        assert chrome.get_log("browser") == []
        requests = [e for e in chrome.get_log("performance") if "requestWillBeSent" in e["message"]]
        assert not [e for e in requests if '"url":"http' in e["message"]]
        plots = chrome.execute_script(DRAWN)
        assert len(plots) >= 9
        assert all(w > 100 and h > 10 and marks > 0 for w, h, marks in plots)
        chrome.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        seen, bad = chrome.execute_script(CONTRAST)
        assert seen > 50
        assert bad == []
        overflow = "return document.documentElement.scrollWidth - innerWidth"
        assert chrome.execute_script(overflow) <= 0, "the page scrolls sideways"
        background = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        chrome.execute_script("document.querySelectorAll('details').forEach(d => d.open = false)")
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        assert chrome.save_screenshot(str(ARTIFACTS / f"report-{scheme}-{width}.png"))
        chrome.execute_script("console.error('seen'); return 1")
        assert "seen" in str(chrome.get_log("browser"))
    finally:
        chrome.quit()
