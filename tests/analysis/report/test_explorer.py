"""The explorer in a real browser says what bhlog sweep says."""

import json

import numpy as np
import pytest

from bhlog.analysis.cells import cell
from bhlog.analysis.run import open_log
from tests.analysis.report.browser import browser, require_browser

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page_open(page):
    require_browser()
    with browser() as shown:
        shown.open(page)
        yield shown


@pytest.fixture(scope="module")
def profile(native, rerun):
    return open_log(native).sweep(rerun, kept=True)


@pytest.mark.parametrize(
    ("alpha", "min_k", "max_k"), [(0.05, 1, 16), (0.3, 2, 6), (0.0001, 0, 16), (0.9, 4, 4)]
)
def test_sliders_give_the_numbers_of_a_sweep_to_the_digit(page_open, profile, alpha, min_k, max_k):
    page_open.set("exact_alpha", alpha)
    page_open.set("min_k", min_k)
    page_open.set("max_k", max_k)
    bounds = {"min_k": min_k, "max_k": max_k}
    assert page_open.text("#x-mean") == cell(profile.mean_experts(alpha, **bounds))
    assert page_open.text("#x-kept") == cell(profile.probability_kept(alpha, **bounds))
    rows = page_open.run(
        "return [...document.querySelectorAll('#x-layers tr')].map("
        "row => [...row.cells].slice(0, 3).map(cell => cell.textContent))"
    )
    assert rows == [
        [
            "all" if layer is None else str(layer),
            cell(profile.mean_experts(alpha, **bounds, layer=layer)),
            cell(profile.probability_kept(alpha, **bounds, layer=layer)),
        ]
        for layer in (*profile.layers, None)
    ]


def test_a_target_of_experts_gives_its_alpha(page_open, profile):
    page_open.set("min_k", 1)
    page_open.set("max_k", 16)
    for experts in (2.5, 4, 7.25):
        page_open.set("target", experts)
        assert page_open.text("#x-alpha") == cell(profile.alpha_for(experts, min_k=1, max_k=16))
    page_open.set("target", 15.99)
    assert page_open.text("#x-say").startswith("No alpha up to 0.999 gives 15.99 experts")
    page_open.set("target", None)


def test_numbers_read_as_in_the_terminal(page_open):
    values = [0.0, 2.3125, 4.0625, 1.00005, 0.00012345, 0.000012345, 123.45, 999.95, 12345.67,
              0.99995, 1e-06, 5.0, 0.1, 2 / 3, 1000.0, 0.30005, 63.9999]  # fmt: skip
    shown = page_open.run("return arguments[0].map(bhlog.number)", values)
    assert shown == [cell(value) for value in values]


def test_a_layer_is_seen_alone_by_list_and_by_click(page_open, profile):
    page_open.set("exact_alpha", 0.3)
    page_open.set("layer", "5")
    expected = cell(profile.mean_experts(0.3, min_k=1, max_k=16, layer=5))
    assert page_open.text("#x-mean") == expected
    page_open.set("layer", "all")
    page_open.run("Bokeh.documents[0].get_model_by_name('means').selected.indices = [2]")
    assert page_open.text("#x-mean") == expected
    assert page_open.run("return Bokeh.documents[0].get_model_by_name('layer').value") == "5"
    page_open.set("layer", "all")


@pytest.mark.parametrize("layer", ["all", "5"])
def test_noise_stands_beside_the_mean_and_in_the_curves(page_open, profile, layer):
    page_open.set("exact_alpha", 0.3)
    page_open.set("layer", layer)
    of = None if layer == "all" else int(layer)
    expected, _ = profile.noise_experts(0.3, min_k=1, max_k=16, layer=of)
    assert page_open.text("#x-noise") == cell(expected)
    drawn = page_open.run(
        "const d = Bokeh.documents[0].get_model_by_name('noise').data;"
        "return d.experts[d.alpha.indexOf(0.3)]"
    )
    assert drawn == pytest.approx(expected)
    page_open.set("layer", "all")


@pytest.mark.parametrize(("alpha", "min_k", "max_k"), [(0.3, 1, 16), (0.8, 0, 16), (0.9, 2, 7)])
def test_a_true_null_gets_as_many_experts_as_uniform_p_values_do(page_open, alpha, min_k, max_k):
    for name, value in (("exact_alpha", alpha), ("min_k", min_k), ("max_k", max_k)):
        page_open.set(name, value)
    p = np.sort(np.random.default_rng(0).random((400_000, 16)), axis=1)
    passes = p <= alpha * np.arange(1, 17) / 16
    n = np.where(passes.any(axis=1), 16 - passes[:, ::-1].argmax(axis=1), 0).clip(min_k, max_k)
    standard_error = n.std() / np.sqrt(len(n))
    assert float(page_open.text("#x-uniform")) == pytest.approx(n.mean(), abs=4 * standard_error)
    page_open.set("min_k", 1)
    page_open.set("max_k", 16)


def test_the_histogram_sums_to_all_rows(page_open):
    shares = page_open.run(
        "return Array.from(Bokeh.documents[0].get_model_by_name('shares').data.share)"
    )
    assert sum(shares) == pytest.approx(100, abs=1e-9)


def test_another_run_answers_with_its_own_bounds_kept(page_open, rerun):
    page_open.set("exact_alpha", 0.3)
    page_open.set("profile", "1")
    own = open_log(rerun).sweep(kept=True)
    assert page_open.text("#x-mean") == cell(own.mean_experts(0.3, min_k=1, max_k=16))
    page_open.set("profile", "0")


def test_the_page_fetches_nothing_and_the_console_is_silent(page_open):
    entries = page_open.driver.get_log("performance")
    asked = [json.loads(entry["message"])["message"] for entry in entries]
    urls = [
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page_open.errors() == []
