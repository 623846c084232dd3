"""The page as people use it: by pointer and by keyboard, on a phone, in the dark, on paper."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bhlog.analysis.report.document import write_report
from bhlog.analysis.report.subject import Subject
from bhlog.analysis.run import open_log
from tests.analysis.report.browser import Page, browser, require_browser

pytestmark = pytest.mark.slow

AXE = os.environ.get("BHLOG_AXE", "axe-core@4.10.2")


@pytest.fixture(scope="module")
def path(native, rerun, tmp_path_factory) -> Path:
    """A page with every panel."""
    require_browser()
    runs = [open_log(native), open_log(rerun)]
    subject = Subject(runs, [rerun / "kde.parquet"], tokenizer="bytes")
    return write_report(subject, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def shown(path):
    with browser() as page:
        page.open(path)
        yield page
        assert page.errors() == []


def focused(page: Page) -> str:
    """What has the keyboard, through shadow roots."""
    return str(
        page.run(
            "let at = document.activeElement; while (at.shadowRoot && at.shadowRoot.activeElement)"
            " at = at.shadowRoot.activeElement;"
            " return `${at.className} ${at.getAttribute('aria-label') || ''}`"
        )
    )


def press(page: Page, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(page.driver)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def point(page: Page, name: str, x: float, y: float, *, click_it: bool = False) -> None:
    """Move the pointer to a place in a plot, in the units of its axes."""
    at = page.run(
        """
        const plot = Bokeh.documents[0].get_model_by_name(arguments[0]);
        const view = Bokeh.index.find_one(plot);
        view.el.scrollIntoView({block: "center", behavior: "instant"});
        const box = view.el.getBoundingClientRect(), frame = view.frame;
        return [box.x + frame.x_scale.compute(arguments[1]),
                box.y + frame.y_scale.compute(arguments[2])];
        """,
        name,
        x,
        y,
    )
    if click_it:
        click(page, *at)
    else:
        page.command("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])


def click(page: Page, x: float, y: float) -> None:
    page.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    for kind in ("mousePressed", "mouseReleased"):
        page.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_a_click_on_a_bar_shows_its_layer_alone(shown):
    point(shown, "by_layer", 1, 0.5, click_it=True)
    shown.wait("document.querySelector('#x-of').textContent.endsWith('layer 1')")
    point(shown, "by_layer", 1, 0.5, click_it=True)
    shown.set("layer", "all")


def test_a_pointer_over_a_mark_shows_its_numbers(shown):
    experts = shown.run("return Bokeh.documents[0].get_model_by_name('means').data.experts[2]")
    point(shown, "by_layer", 2, 0.5)
    tips = (
        "(() => { const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("
        "'by_layer')); const found = []; const walk = (root) => { for (const one of "
        "root.querySelectorAll('*')) { if (one.tagName.toLowerCase() === 'div' && "
        "one.classList.contains('bk-tooltip-row-value') || one.classList.contains("
        "'bk-tooltip-row-value')) found.push(one.textContent); if (one.shadowRoot) "
        "walk(one.shadowRoot); } }; walk(document); return found.join(' '); })()"
    )
    shown.wait(f"{tips}.includes('{experts:.3f}')")


def test_a_name_in_the_legend_switches_its_curve(shown):
    at = shown.run(
        """
        const plot = Bokeh.documents[0].get_model_by_name('curve');
        const view = Bokeh.index.find_one(plot);
        view.el.scrollIntoView({block: "center", behavior: "instant"});
        const legend = plot.below.find((one) => one.type === 'Legend');
        const box = view.views.find_one(legend).bbox, canvas = view.el.getBoundingClientRect();
        return [canvas.x + box.x + 30, canvas.y + box.y + 14];
        """
    )
    visible = (
        "return Bokeh.documents[0].get_model_by_name('curve').below.find((one) => "
        "one.type === 'Legend').items[0].renderers[0].visible"
    )
    assert shown.run(visible) is True
    click(shown, *at)
    assert shown.run(visible) is False
    shown.set("exact_alpha", 0.2)  # sliders still answer
    assert shown.text("#x-alpha") == "0.2"
    click(shown, *at)
    assert shown.run(visible) is True


def test_tables_sort_by_their_numbers_both_ways(shown):
    table = "#load table"
    shown.run("document.querySelector('#load details').open = true")
    names = shown.run(f"return [...document.querySelectorAll('{table} thead th')]"
                      ".slice(0, 4).map(e => e.textContent)")  # fmt: skip
    column = names.index("rows")
    script = (
        "const table = document.querySelector(arguments[0]);"
        "table.tHead.rows[0].cells[arguments[1]].querySelector('button').click();"
        "return [...table.tBodies[0].rows].map((row) => Number((row.cells[arguments[1]]"
        ".dataset.value ?? row.cells[arguments[1]].textContent).replaceAll(',', '')))"
    )
    up = shown.run(script, table, column)
    down = shown.run(script, table, column)
    assert up == sorted(up) and down == sorted(up, reverse=True) and len(set(up)) > 5


def test_sliders_move_by_keyboard_alone(shown):
    from selenium.webdriver.common.keys import Keys

    shown.run("document.querySelector('.skip').focus()")
    for _ in range(60):
        press(shown, Keys.TAB)
        if "noUi-handle" in focused(shown):
            break
    assert focused(shown).endswith("alpha")
    before = float(shown.text("#x-alpha"))
    for _ in range(5):
        press(shown, Keys.ARROW_RIGHT)
    after = float(shown.text("#x-alpha"))
    assert after > before
    press(shown, Keys.TAB)
    assert focused(shown).endswith("min_k")
    press(shown, Keys.ARROW_RIGHT)
    assert shown.text("#x-min-k-now") == "2"


def test_tokens_are_walked_by_keyboard_and_show_their_step_up(shown):
    from selenium.webdriver.common.keys import Keys

    shown.run("document.querySelector('#t-tokens').focus()")
    press(shown, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert ", token 1:" in shown.text("#t-about")
    rows = shown.run("return document.querySelectorAll('#t-steps tbody tr').length")
    assert rows == 10
    active = shown.run("return document.querySelector('#t-tokens').getAttribute("
                       "'aria-activedescendant')")  # fmt: skip
    assert active == "t-1"


def test_dark_is_followed_and_can_be_chosen(path):
    ground = "return getComputedStyle(document.body).backgroundColor"
    axis = "return Bokeh.documents[0].get_model_by_name('curve').below[0].major_label_text_color"
    with browser(dark=True) as page:
        page.open(path)
        assert page.run(ground) == "rgb(15, 20, 25)" and page.run(axis) == "#a3b0bf"
        page.find("#theme").click()
        assert page.run(ground) == "rgb(246, 247, 249)" and page.run(axis) == "#566273"
        assert page.errors() == []


def test_a_phone_scrolls_down_only(path):
    with browser(360, 740) as page:
        page.open(path)
        assert page.run("return document.documentElement.scrollWidth") == 360
        wide = page.run(
            "return [...document.querySelectorAll('figure, .readouts > div, .controls > div')]"
            ".filter((one) => one.getBoundingClientRect().right > 360).length"
        )
        assert wide == 0
        assert page.errors() == []


def test_on_paper_all_numbers_are_open_and_nothing_scrolls(shown):
    shown.run("dispatchEvent(new Event('beforeprint'))")
    shown.media(kind="print")
    assert shown.run("return document.querySelectorAll('details:not([open])').length") == 0
    assert shown.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    height = "return getComputedStyle(document.querySelector('.scroll')).maxHeight"
    assert shown.run(height) == "none"
    pdf = shown.command("Page.printToPDF")["data"]
    assert len(pdf) > 50_000
    shown.media()
    assert shown.run("return document.querySelectorAll('details:not([open])').length") > 0


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """axe-core's script, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        if os.environ.get("CI"):
            pytest.fail("in CI axe-core is run: apt-get install -y npm")
        pytest.skip("no npm to fetch axe-core with: apt-get install -y npm")
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run([npm, "install", "--silent", "--no-save", "--prefix", folder, AXE], check=True)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_outside_of_bokehs_own_widgets(path, axe, dark):
    with browser(dark=dark) as page:
        page.open(path)
        page.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        page.run(axe)
        found = page.driver.execute_async_script(
            "axe.run(document).then((done) => arguments[0](done.violations.map((one) => "
            "({id: one.id, nodes: one.nodes.map((node) => node.target)}))))"
        )
        # a target in a shadow root is a list of selectors: those are Bokeh's
        ours = {
            one["id"]: nodes
            for one in found
            if (nodes := [t for t in one["nodes"] if not any(isinstance(s, list) for s in t)])
        }
        assert ours == {}
        inside = sorted({one["id"] for one in found})
        print("inside Bokeh's widgets:", inside)
