"""The HTML report in a browser: sorting, searching, shading, hostile texts, no network, and pictures to look at.

Pictures are written to the folder that the environment variable HF_MSIF_PICTURES names, else to a temporary one.
"""

import base64
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.report import HOSTILE, Asked, scores_of

from hf_msif.reports.visible import visible

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install hf_msif[test]")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no Chromium: apt-get install chromium chromium-driver"
)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PICTURES = {"wide": (1200, "light"), "wide-dark": (1200, "dark"), "phone": (390, "light"), "phone-dark": (390, "dark")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A report with shares, and one of hostile texts."""
    folder, asked = tmp_path_factory.mktemp("files"), Asked()
    asked.scores.to_html(folder / "shaded.html", k=4, query=asked.query)
    influence = np.random.default_rng(0).normal(size=(len(HOSTILE), 2))
    tests = [{"example_id": text, "text": text, "label": text} for text in HOSTILE[:2]]
    scores_of(influence, HOSTILE, tests, noise_text=HOSTILE[0]).to_html(folder / "hostile.html", k=len(HOSTILE))
    return folder


def opened(browser, path):
    browser.get("about:blank")
    browser.get_log("performance")  # without what the browser's own first page asks for
    browser.get(path.as_uri())
    return browser


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent.trim())", selector
    )


def click(browser, table, name):
    """Clicks on the head of a column; returns its data in the order of the table."""
    return browser.execute_script(
        """
        const table = document.querySelector(`table.${arguments[0]}`);
        const head = [...table.querySelectorAll("th")].find(th => th.textContent === arguments[1]);
        head.querySelector("button").click();
        const cells = [...table.tBodies[0].rows].map(row => row.cells);
        return cells.map(row => [row[head.cellIndex].dataset.value, row[0].textContent]);
        """,
        table,
        name,
    )


def test_a_click_on_a_head_sorts_and_another_one_turns_it_round(browser, files):
    opened(browser, files / "shaded.html")
    for name in ("Influence", "BM25", "± SE", "Encoder cosine", "In top"):
        down = [float(value) for value, _ in click(browser, "helpful", name)]
        assert down == sorted(down, reverse=True), name
        assert browser.execute_script("return document.querySelector('th[aria-sort]').ariaSort") == "descending"
        up = [float(value) for value, _ in click(browser, "helpful", name)]
        assert up == sorted(up), name
    places = [place for _, place in click(browser, "helpful", "#")]
    assert places == sorted(places, key=int)
    click(browser, "helpful", "Text")
    shown = texts(browser, "section.test:first-of-type table.helpful td.wide > .text")
    own = browser.execute_script("return [...arguments[0]].sort((a, b) => a.localeCompare(b))", shown)
    assert shown == own
    assert len(browser.execute_script("return document.querySelectorAll('th[aria-sort]')")) == 1


def test_the_box_searches_all_lists(browser, files):
    opened(browser, files / "shaded.html")
    lines = texts(browser, "tr[data-row] td.wide > .text")
    word = lines[0].split()[0].upper()
    expected = sum(word.lower() in line.lower() for line in lines)
    box = browser.find_element("id", "search")
    box.send_keys(word)
    assert texts(browser, "output") == [f"{expected} of {len(lines)} lines"]
    shown = texts(browser, "tr[data-row]:not([hidden]) td.wide > .text")
    assert len(shown) == expected
    assert all(word.lower() in line.lower() for line in shown)
    box.send_keys(" xyzzy\n")
    assert texts(browser, "output") == [f"0 of {len(lines)} lines"]
    assert browser.current_url == (files / "shaded.html").as_uri()
    box.clear()
    box.send_keys(" ")
    assert len(texts(browser, "tr[data-row]:not([hidden])")) == len(lines)


def test_stronger_tokens_are_shaded_more(browser, files):
    opened(browser, files / "shaded.html")
    shades = browser.execute_script(
        """
        return [...document.querySelectorAll("td .token")].map(token => {
          const color = getComputedStyle(token).backgroundColor.match(/[\\d.]+/g).map(Number);
          return [Number(token.style.getPropertyValue("--strength")), Number(token.dataset.value), color];
        });
        """
    )
    assert len(shades) > 20
    by_strength = sorted(shades)
    alphas = [color[3] for _, _, color in by_strength]
    assert alphas == sorted(alphas)
    assert alphas[-1] > 0.4
    assert {tuple(color[:3]) for _, value, color in shades if value > 0} == {(205.0, 75.0, 20.0)}
    assert {tuple(color[:3]) for _, value, color in shades if value < 0} == {(20.0, 110.0, 200.0)}


def test_hostile_texts_are_inert(browser, files):
    opened(browser, files / "hostile.html")
    click(browser, "helpful", "Text")
    browser.find_element("id", "search").send_keys("<script>")
    assert browser.execute_script("return window.hacked === undefined")
    assert browser.execute_script("return document.querySelectorAll('img, script').length") == 1
    shown = set(texts(browser, "tr[data-row] td.wide > .text"))
    assert shown == {visible(text).strip() for text in HOSTILE}
    # What a text turns round stays in its own box.
    isolated = browser.execute_script(
        "const isolates = text => getComputedStyle(text).unicodeBidi.startsWith('isolate');"
        "return [...document.querySelectorAll('bdi')].every(isolates);"
    )
    assert isolated


@pytest.mark.parametrize("name", ["shaded.html", "hostile.html"])
def test_nothing_is_asked_of_a_network(browser, files, name):
    opened(browser, files / name)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(files / name).as_uri()]
    assert not browser.get_log("browser")  # no error, and nothing that the page's own policy refused


@pytest.mark.parametrize(("picture", "way"), PICTURES.items())
def test_pictures(browser, files, tmp_path, picture, way):
    """No line is wider than the page, and a dark page is dark."""
    (width, scheme), folder = way, Path(os.environ.get("HF_MSIF_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for name in ("shaded", "hostile"):
        opened(browser, files / f"{name}.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")
        assert (max(map(int, paper)) < 64) is (scheme == "dark")
        data = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
        (folder / f"{name}-{picture}.png").write_bytes(base64.b64decode(data))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_paper_has_everything(browser, files):
    opened(browser, files / "shaded.html")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return [...document.querySelectorAll('details')].every(each => each.open)")
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert not browser.execute_script("return [...document.querySelectorAll('details')].some(each => each.open)")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert base64.b64decode(printed).startswith(b"%PDF")
