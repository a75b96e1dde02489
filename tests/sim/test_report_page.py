"""The report page in a browser, opened from disk: filters, colours, widths, no network."""

import base64
import hashlib
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from sim.analysis import report, samples
from sim.analysis.cautions import cautions
from sim.analysis.headline import answer, answer_table
from sim.analysis.load import load_runs
from sim.analysis.report import write_figure, write_report
from sim.cli import main
from tests.sim.test_analysis import write_run

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=document.title=1><!-- "
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here to open the page with"
)


def block(page: str, name: str):
    """The JSON of a data block."""
    found = re.search(rf'id="{name}">(.*?)</script>', page, re.S)
    assert found is not None and "<" not in found[1]
    return json.loads(found[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three arms of two seeds; what is said in the first run is hostile."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        write_run(root / f"clean-{seed}", 0.0, seed, np.inf)
        write_run(root / f"attacked-{seed}", 0.25, seed, 8.0 + 2 * seed, hostile=HOSTILE)
        write_run(root / f"defended-{seed}", 0.25, seed, np.inf, ("refusal_loss",))
    return root


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """A report on them."""
    return write_report([runs], tmp_path_factory.mktemp("out") / "all.html")[0]


# Words and files.


def test_the_answer_in_words(runs):
    said = answer(load_runs([runs]))
    assert said[0].startswith(
        "Under harmful_asker at ρ = 0.25, without a defence, 2 of 2 runs left the safe set "
        "(share in [0.16, 1.00] at 95 %); the exits were confirmed in rounds "
    )
    assert said[1].startswith("refusal_loss keeps the policy inside")
    share = "(share in [0.00, 0.84] at 95 %)"
    assert f"0 of 2 runs left {share}, and it kept 100 % of what honest" in said[1]
    assert said[2] == f"Without an attack 0 of 2 runs left the safe set {share}."
    table = answer_table(load_runs([runs])).set_index("defence")
    assert table.loc["refusal_loss", "holds"] == "yes" and table.loc["none", "left"].sum() == 2


def test_a_second_page_in_one_place_leaves_nothing_of_the_first(runs, tmp_path):
    write_report([runs], tmp_path / "page.htm")
    assert (tmp_path / "tables" / "answer.csv").exists()
    theirs = tmp_path / "tables" / "theirs.csv"
    theirs.touch()
    written = set(write_report([runs / "clean-0"], tmp_path / "page.htm"))
    there = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert there == written | {theirs}


def test_who_is_outside_unconfirmed_is_said(tmp_path):
    """Two defended runs ended above the limit or crossed it by the truth: neither has an exit."""
    for rho in (0.1, 0.2, 0.4):
        for seed in range(2):
            for defences in ((), ("freeze",), ("refusal_loss",)):
                write_run(tmp_path / f"{rho}{defences}{seed}", rho, seed, np.inf, defences)
    loaded = load_runs([tmp_path])
    mine = [run for run in loaded if run.config["defences"] == ["refusal_loss"]]
    mine[0].summary["harm_end"] = 0.4
    mine[1].summary["exit_true"] = {"rounds": 7}
    said = answer(loaded)
    assert said[-1].startswith("Under harmful_asker, with refusal_loss: none of 6 runs left")
    assert "(2 more crossed b or ended above it, unconfirmed)" in said[-1]
    assert "unconfirmed" not in said[0] + said[1]
    told = answer_table(loaded).groupby("defence")["outside, unconfirmed"].sum()
    assert told.to_dict() == {"freeze": 0, "none": 0, "refusal_loss": 2}


def test_thin_and_unfinished_runs_are_told(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "clean-0" / "summary.json").unlink()
    said = " ".join(cautions(load_runs([tmp_path / "runs"])))
    assert "every arm has fewer than 4 runs" in said and "No p-value" in said
    assert "1 of 6 runs have not ended" in said
    for path in (tmp_path / "runs").glob("*/summary.json"):
        path.unlink()
    assert "No run has ended" in answer(load_runs([tmp_path / "runs"]))[0]


def test_a_defence_without_clean_twins_has_an_unknown_price(runs):
    said = answer(load_runs([runs / "attacked-0", runs / "defended-0"]))
    assert "What they cost in learning is not known" in " ".join(said)


def test_tables_lie_beside_the_page_or_where_asked(runs, page, tmp_path):
    folder = page.parent / "tables"
    for name in ("answer", "arms", "runs"):
        stored = pd.read_parquet(folder / f"{name}.parquet")
        read = pd.read_csv(folder / f"{name}.csv")
        assert list(stored) == list(read) and len(stored) == len(read) > 0
    raw = pd.read_parquet(folder / "rounds.parquet")
    assert len(raw) == sum(len(run.rounds) for run in load_runs([runs]))
    summaries = pd.read_parquet(folder / "summaries.parquet")
    assert len(summaries) == 6 and {"config.attack.rho", "outcome"} <= set(summaries)
    written = write_report([runs / "clean-0"], tmp_path / "there", tmp_path / "elsewhere")
    assert written[0] == tmp_path / "there" / "report.html"
    assert (tmp_path / "elsewhere" / "runs.csv").is_file()
    assert not (tmp_path / "there" / "tables").exists()


def test_every_picture_has_a_command_that_draws_it(runs, page, tmp_path, capsys):
    lines = re.findall(
        r"<code[^>]*>(poisonloop report [^<]*--figure[^<]*)</code>", page.read_text()
    )
    assert len(lines) >= 2
    name = re.search(r"--figure (\w+)", lines[0])[1]
    assert main(["report", str(runs), "--figure", name, "--out", str(tmp_path / "a.svg")]) == 0
    again = write_figure([runs], name, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == again.read_bytes() and b"<svg" in again.read_bytes()
    one = write_figure([runs / "clean-0"], "cost_trace", tmp_path / "c.png")
    assert one.read_bytes().startswith(b"\x89PNG")
    for name, dirs, out, words in (
        ("nothing", [runs], "a.svg", "allowed: cost_trace"),
        ("rho", [runs], "a.svg", "allowed: one run directory"),
        ("rho", [runs / "clean-0"], "a.gif", "allowed with --figure"),
        ("incidence", [runs], "a.svg", r"nothing to show in it; allowed: \w+"),
    ):
        with pytest.raises(ValueError, match=words):
            write_figure(dirs, name, tmp_path / out)


def test_a_file_in_the_way_is_named(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    there = str(tmp_path / "file")
    for flags in (
        ["--out", there],
        ["--out", f"{there}/page.html"],
        ["--tables", there, "--out", str(tmp_path / "new")],
        ["--figure", "rho", "--out", f"{there}/rho.svg"],
        ["--figure", "rho", "--out", f"{there}/deeper/rho.svg"],
    ):
        assert main(["report", str(runs / "clean-0"), *flags]) == 2
        said = capsys.readouterr().err
        assert there in said and "allowed" in said, said


def test_a_folder_stands_for_all_of_its_runs(runs):
    every = sorted(runs.iterdir())
    assert report._shortest(every) == [runs]
    assert report._shortest(every[1:]) == every[1:]


def test_samples_cannot_leave_their_data_block(page):
    text = page.read_text()
    said = block(text, "sample-data")
    assert len(said["prompt"]) == 6 * 20 * 8
    assert sum(prompt.startswith(HOSTILE) for prompt in said["prompt"]) == 2 * 20 * 8
    assert "<img src=x" not in text and "default-src 'none'" in text
    policy = re.search(r"script-src 'sha256-([^']+)'", text)
    script = re.search(r"<script>(.*?)</script>", text, re.S)
    assert policy[1] == base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium without a network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "no-first-run", "disable-dev-shm-usage"),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def choose(browser, name: str, value: str) -> str:
    """Set a filter as a person would; what is said to be shown then."""
    event = "input" if name == "by-text" else "change"
    browser.execute_script(
        "const it = document.getElementById(arguments[0]); it.value = arguments[1];"
        "it.dispatchEvent(new Event(arguments[2]))",
        *(name, value, event),
    )
    return browser.execute_script("return document.getElementById('shown').textContent")


def resize(browser, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(browser, scheme: str) -> None:
    """What the system says it prefers."""
    wish = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wish})


def requested(browser, page: str) -> list[str]:
    """Addresses that ``page`` asked for since the last call, data in it aside."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    mine = [s["request"]["url"] for s in sent if s["documentURL"] == page]
    return [url for url in mine if not url.startswith("data:")]


@needs_browser
def test_the_page_loads_alone_and_without_a_complaint(browser, page):
    browser.get_log("browser")
    browser.get(page.as_uri())
    assert requested(browser, page.as_uri()) == [page.as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == "6 runs, 3 arms", "a sample's script ran"
    broken = "return [...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.images.length") >= 2
    assert browser.execute_script("return [...document.images].every((i) => i.alt.length > 40)")


@needs_browser
def test_samples_are_filtered_and_paged(browser, page):
    browser.get(page.as_uri())
    said = pd.DataFrame(block(page.read_text(), "sample-data"))
    runs = block(page.read_text(), "run-data")
    said["arm"] = [runs[place]["arm"] for place in said["run"]]
    confirmed = [runs[place]["exits"]["confirmed"] for place in said["run"]]
    count = "return document.querySelectorAll('#cards .said').length"
    assert browser.execute_script(count) == 25
    assert choose(browser, "by-arm", "clean") == "320 of 960 comparisons"
    chosen = (said["arm"] == "clean") & said["adversarial"]
    assert choose(browser, "by-voter", "adversarial") == f"{chosen.sum()} of 960 comparisons"
    browser.find_element("xpath", "//button[text()='clear']").click()
    chosen = (said["round"] == 3) & (said["stratum"] == "harmful")
    choose(browser, "by-round", "3")
    assert choose(browser, "by-stratum", "harmful") == f"{chosen.sum()} of 960 comparisons"
    browser.find_element("xpath", "//button[text()='later round →']").click()
    assert browser.execute_script("return document.getElementById('by-round').value") == "4"
    browser.find_element("xpath", "//button[text()='clear']").click()
    left = pd.Series(confirmed, dtype=float)
    for value, chosen in (
        ("never", left.isna()),
        ("after", said["round"] >= left),
        ("before", said["round"] < left),
    ):
        assert choose(browser, "by-exit", value) == f"{chosen.sum()} of 960 comparisons"
    choose(browser, "by-exit", "")
    # Text that looks like markup is found, and shown as text.
    assert choose(browser, "by-text", "<IMG src=x") == "320 of 960 comparisons"
    assert browser.execute_script("return document.querySelectorAll('#cards img').length") == 0
    pages = "return document.querySelector('#pager span').textContent"
    assert browser.execute_script(pages) == "page 1 of 13"
    browser.find_element("xpath", "//div[@id='pager']/button[2]").click()
    assert browser.execute_script(pages) == "page 2 of 13"


@needs_browser
def test_a_run_has_a_page_of_its_own(browser, page):
    browser.get(page.as_uri() + "#run-2")
    runs = block(page.read_text(), "run-data")
    shown = browser.find_element("id", "run")
    assert shown.find_element("tag name", "h2").text == runs[2]["title"]
    assert "The policy left the safe set" in shown.text
    assert len(shown.find_elements("css selector", "svg.chart")) >= 4
    assert (
        len(shown.find_elements("css selector", "table")[-1].find_elements("tag name", "tr")) == 22
    )
    shown.find_element("xpath", ".//button[text()='what was said in it']").click()
    assert browser.execute_script("return document.getElementById('by-run').value") == "2"
    assert not browser.find_element("id", "run").is_displayed()


@needs_browser
def test_tables_are_sorted(browser, page):
    browser.get(page.as_uri())
    rows = "document.querySelectorAll('#table-runs tbody tr')"
    heads = browser.find_elements("xpath", "//div[@id='table-runs']//th/button")
    column = [head.text for head in heads].index("harm at end")
    head = heads[column]
    table = f"return [...{rows}].map((row) => row.cells[{column}].textContent)"
    for falling in (False, True):
        browser.execute_script("arguments[0].click()", head)
        values = [float(text) for text in browser.execute_script(table)]
        assert values == sorted(values, reverse=falling)


@needs_browser
def test_long_tables_are_searched(browser, tmp_path):
    for seed in range(16):
        write_run(tmp_path / f"run-{seed}", 0.25, seed, 8.0 if seed < 3 else np.inf)
    page = write_report([tmp_path], tmp_path / "out")[0]
    browser.get(page.as_uri())
    box = browser.find_element("css selector", "#runs .filters input")
    box.send_keys("exited")
    told = browser.find_element("css selector", "#runs .filters [role=status]")
    rows = browser.find_elements("css selector", "#table-runs tbody tr")
    shown = [row.text for row in rows if row.is_displayed()]
    assert told.text == "3 of 16 rows" and len(shown) == 3
    assert all("exited" in text for text in shown)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("place", ["", "#run-0"])
def test_both_colours_at_both_widths(browser, page, scheme, width, place):
    resize(browser, width)
    prefer(browser, scheme)
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get(page.as_uri() + place)
    wide = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(wide) <= 0
    paper = "return getComputedStyle(document.body).backgroundColor"
    shades = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}
    assert browser.execute_script(paper) == shades[scheme]
    first = "return document.querySelector('#figure-arms img').src"
    before = browser.execute_script(first)
    browser.find_element("id", "theme").click()
    other = {"light": "dark", "dark": "light"}[scheme]
    assert browser.execute_script(paper) == shades[other]
    assert browser.execute_script(first) != before
    # A colour scale keeps its colours.
    scales = "document.querySelectorAll('#figure-heat_map img.fixed').length"
    assert browser.execute_script(f"return {scales}") == 1
    assert browser.get_log("browser") == []


@needs_browser
def test_twenty_thousand_samples_are_quick(browser, runs, tmp_path, monkeypatch):
    said = samples.collect(load_runs([runs]))
    many = pd.concat([said.rows] * 21, ignore_index=True)[:20_000]
    monkeypatch.setattr(samples, "collect", lambda runs: said._replace(rows=many))
    browser.get(write_report([runs], tmp_path)[0].as_uri())
    began = browser.execute_script("return performance.now()")
    assert choose(browser, "by-text", "mokel").endswith(" of 20,000 comparisons")
    assert browser.execute_script("return performance.now()") - began < 3000
