import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde, norm

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.bandwidth import (
    check_bandwidth,
    choose_bandwidth,
    improved_sheather_jones,
    lattice_spacing,
    nrd0,
    scott,
    silverman,
    standard_deviation,
)
from bhlog.capture.contract.null.histogram import BIN_WIDTH, Histogram
from tests.synthetic import to_bfloat16

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(-1, 1.3, 100_000).astype(np.float32)
BIMODAL = np.concatenate([RNG.normal(-2, 0.3, 60_000), RNG.normal(3, 0.6, 40_000)]).astype(
    np.float32
)


def slow_isj(values, bins=2**14):
    """Botev's kde.m on the values themselves: fixed point by bisection, sums in plain loops."""
    low, high = values.min(), values.max()
    margin = (high - low) / 10
    low, high = low - margin, high + margin
    counts, _ = np.histogram(values, bins, (low, high))
    k = np.arange(1, 400)
    mids = (np.arange(bins) + 0.5) / bins
    a = np.array([2 * (counts / len(values)) @ np.cos(np.pi * j * mids) for j in k])
    squares = (a / 2) ** 2

    def norm_of(s, t):
        return (
            2
            * np.pi ** (2 * s)
            * (k ** (2.0 * s) * squares * np.exp(-((k * np.pi) ** 2) * t)).sum()
        )

    def gamma(t):
        f = norm_of(7, t)
        for s in range(6, 1, -1):
            odd = np.prod(np.arange(1, 2 * s, 2.0)) / np.sqrt(2 * np.pi)
            const = (1 + 0.5 ** (s + 0.5)) / 3
            f = norm_of(s, (2 * const * odd / len(values) / f) ** (2 / (3 + 2 * s)))
        return (2 * len(values) * np.sqrt(np.pi) * f) ** (-2 / 5)

    below, above = 1e-7, 0.1
    for _ in range(60):
        middle = np.sqrt(below * above)
        below, above = (middle, above) if middle < gamma(middle) else (below, middle)
    return np.sqrt(below) * (high - low)


@pytest.mark.parametrize(
    "values", [NORMAL, BIMODAL, NORMAL[:500]], ids=["normal", "bimodal", "few"]
)
def test_scott_and_silverman_are_scipys(values):
    h = Histogram.of(values)
    sd = values.astype(float).std(ddof=1)
    assert standard_deviation(h) == pytest.approx(sd, rel=1e-8)
    assert scott(h) == pytest.approx(gaussian_kde(values).factor * sd, rel=1e-6)
    expected = gaussian_kde(values, bw_method="silverman").factor * sd
    assert silverman(h) == pytest.approx(expected, rel=1e-6)


def slow_nrd0(values):
    """R's bw.nrd0 on the values themselves."""
    low, high = np.quantile(values, [0.25, 0.75])
    sd = values.std(ddof=1)
    return 0.9 * (min(sd, (high - low) / 1.34) or sd) * len(values) ** -0.2


@pytest.mark.parametrize(
    "values", [NORMAL, BIMODAL, NORMAL[:500], NORMAL[:2]], ids=["normal", "bimodal", "few", "two"]
)
def test_nrd0_is_rs(values):
    assert nrd0(Histogram.of(values)) == pytest.approx(slow_nrd0(values.astype(float)), rel=2e-3)


def test_nrd0_without_quartiles_apart_has_the_standard_deviation():
    values = np.array([1.0] * 90 + [2.0] * 10, np.float32)
    assert nrd0(Histogram.of(values)) == pytest.approx(slow_nrd0(values.astype(float)), rel=1e-6)
    assert slow_nrd0(values.astype(float)) > 0.1


def test_the_rule_that_was_used_is_told():
    values = np.array([0.25, 1.0] * 50, np.float32)  # no root in two values
    assert improved_sheather_jones(Histogram.of(values)) is None
    found = choose_bandwidth(Histogram.of(values), "isj")
    assert found.rule == "isj, silverman"
    assert found == (choose_bandwidth(Histogram.of(values), "silverman").width, "isj, silverman")
    assert choose_bandwidth(Histogram.of(NORMAL), "isj").rule == "isj"


@pytest.mark.parametrize("values", [NORMAL, BIMODAL], ids=["normal", "bimodal"])
def test_improved_sheather_jones_is_botevs(values):
    # the two bin on other edges; the bandwidth moves with them by less than 0.1 %
    assert improved_sheather_jones(Histogram.of(values)) == pytest.approx(
        slow_isj(values), rel=1e-3
    )


def test_improved_sheather_jones_sees_the_modes_that_scott_blurs():
    h = Histogram.of(BIMODAL)
    assert improved_sheather_jones(h) < scott(h) / 5


@pytest.mark.parametrize("values", [NORMAL, BIMODAL], ids=["normal", "bimodal"])
@pytest.mark.parametrize("rule", ["scott", "silverman", "isj"])
def test_bfloat16_logits_get_the_bandwidth_of_the_logits_they_round(values, rule):
    rounded = choose_bandwidth(Histogram.of(to_bfloat16(values)), rule).width
    assert rounded == pytest.approx(choose_bandwidth(Histogram.of(values), rule).width, rel=0.01)


def test_a_rule_never_resolves_the_lattice_of_the_values():
    lattice = np.repeat(np.arange(-8, 9) / 8, 10_000).astype(np.float32)
    h = Histogram.of(lattice)
    assert lattice_spacing(h) == 1 / 8
    for rule in ("scott", "silverman", "isj"):
        assert choose_bandwidth(h, rule).width >= 1 / 8
    assert choose_bandwidth(h, 0.01) == (0.01, "fixed")


def test_the_spacing_of_bfloat16_is_that_of_the_larger_logits():
    values = to_bfloat16(np.random.default_rng(1).normal(3, 0.3, 500_000).astype(np.float32))
    assert lattice_spacing(Histogram.of(values)) == 2.0**-6
    assert lattice_spacing(Histogram.of(NORMAL)) == 0
    assert lattice_spacing(Histogram.of(NORMAL[:100])) == 0


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0, 0.5]])
@pytest.mark.parametrize("rule", ["scott", "silverman", "isj"])
def test_few_values_get_a_bandwidth_above_0(values, rule):
    assert choose_bandwidth(Histogram.of(np.array(values, np.float32)), rule).width >= BIN_WIDTH


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([0.25, 0.5, 2.0, 4.0]), st.integers(-8, 8))
def test_rules_shift_and_scale_with_the_values(scale, shift):
    values = np.random.default_rng(2).normal(0, 1, 3000).astype(np.float32)
    moved = (values * scale + shift).astype(np.float32)
    for rule in ("scott", "silverman", "isj"):
        expected = choose_bandwidth(Histogram.of(values), rule).width * scale
        assert choose_bandwidth(Histogram.of(moved), rule).width == pytest.approx(
            expected, rel=5e-3
        )


def test_improved_sheather_jones_uses_the_number_of_values():
    once = norm.ppf((np.arange(20_000) + 0.5) / 20_000).astype(np.float32)
    one = improved_sheather_jones(Histogram.of(once))
    many = improved_sheather_jones(Histogram.of(np.tile(once, 16)))
    assert many / one == pytest.approx(16**-0.2, rel=0.05)


@pytest.mark.parametrize("bandwidth", ["wide", 0.0, -1.0, 1e-9, 1e9, float("inf"), float("nan")])
def test_a_bad_bandwidth_is_refused(bandwidth):
    with pytest.raises(InvalidOption, match="bandwidth must be"):
        check_bandwidth(bandwidth)
