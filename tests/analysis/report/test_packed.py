"""What a page carries of a profile says what the profile says."""

import base64
import zlib

import numpy as np
import pytest

from bhlog.analysis.report import packed
from bhlog.analysis.report.packed import Named, bounds_of, deflated, pack
from bhlog.analysis.run import open_log
from bhlog.analysis.sweep.profile import Profile
from tests.synthetic import normal_kde, write_run


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Profile:
    folder = write_run(tmp_path_factory.mktemp("run") / "run", n_experts=16, length=40)
    return open_log(folder).sweep(normal_kde((0, 1, 2)), kept=True)


def inflated(text: str, *shape: int) -> np.ndarray:
    """What the page's script makes of `deflated`, the slow way."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(8, -1)
    values = sum(planes[i].astype(object) * 256**i for i in range(8))
    return np.asarray(values).reshape(shape)


def test_deflated_integers_come_back():
    values = np.array([[0, 1, 255], [256, 1 << 40, (1 << 53) - 1]])
    assert inflated(deflated(values), 2, 3).tolist() == values.tolist()


def means(page: dict, low: int, high: int) -> np.ndarray:
    """(L, J) mean experts of a page within two of its bounds, by their places."""
    shape = len(page["layers"]), len(page["bounds"]) - 1, len(page["alphas"])
    counts = np.cumsum(inflated(page["counts"], *shape), axis=2)
    sums = np.cumsum(inflated(page["sums"], *shape), axis=2) if page["sums"] else counts.cumsum(1)
    sums = np.concatenate([np.zeros_like(sums[:, :1]), sums], axis=1)
    rows = np.array(page["rows"])[:, None]
    return page["bounds"][low] + (sums[:, high] - sums[:, low]).astype(float) / rows


def check_means(page: dict, profile: Profile) -> None:
    for low, high in ((0, len(page["bounds"]) - 1), (1, 5), (2, 2)):
        min_k, max_k = page["bounds"][low], page["bounds"][high]
        for layer, found in zip(page["layers"], means(page, low, high), strict=True):
            expected = [
                profile.mean_experts(alpha, min_k=min_k, max_k=max_k, layer=layer)
                for alpha in page["alphas"][:: max(1, len(page["alphas"]) // 50)]
            ]
            assert found[:: max(1, len(page["alphas"]) // 50)].tolist() == expected


def test_a_page_holds_a_small_profile_whole(profile):
    page = pack(Named("x", profile, 8, "bhlog sweep x"))
    assert page["alphas"] == profile.alphas.tolist()
    assert page["bounds"] == list(range(17))
    assert page["left_out"] == ""
    check_means(page, profile)


def test_a_page_of_a_large_model_is_exact_where_it_answers(profile, monkeypatch):
    monkeypatch.setattr(packed, "MOST_CELLS", 3_000)
    monkeypatch.setattr(packed, "MOST_BOUNDS", 8)
    page = pack(Named("x", profile, 8, "bhlog sweep x"))
    assert {0.05, 0.3, 0.9} < {*page["alphas"]} < {*profile.alphas.tolist()}
    assert page["bounds"][:9] == list(range(9)) and page["bounds"][-1] == 16
    assert page["left_out"].startswith("To stay small, this page holds")
    check_means(page, profile)


def test_the_probability_kept_is_that_of_the_profile(profile):
    page = pack(Named("x", profile, 8, "bhlog sweep x"))
    shape = 3, 16, len(page["stops"])
    reached = np.cumsum(inflated(page["kept"]["reached"], *shape), axis=2)
    always = inflated(page["kept"]["always"], 3, 16)
    for stop in (0, 900, len(page["stops"]) - 1):
        alpha = page["alphas"][page["stops"][stop]]
        for i, layer in enumerate(page["layers"]):
            sums = always[i, 1] + reached[i, 11, stop] - reached[i, 1, stop]
            found = sums / (page["one"] * page["rows"][i])
            assert found == profile.probability_kept(alpha, min_k=2, max_k=12, layer=layer)


def test_noise_is_that_of_the_profile(profile):
    page = pack(Named("x", profile, 8, "bhlog sweep x"))
    sums = np.cumsum(inflated(page["noise"]["sums"], 3, 16, len(page["alphas"])), axis=2)
    for place in (0, 500, len(page["alphas"]) - 1):
        found = 2 + (sums[:, 11, place] - sums[:, 1, place]) / page["noise"]["rows"]
        alpha = page["alphas"][place]
        expected = [
            profile.noise_experts(alpha, min_k=2, max_k=12, layer=i) for i in page["layers"]
        ]
        assert found == pytest.approx([mean for mean, _ in expected])


def test_bounds_of_large_routers_grow_by_steps():
    assert bounds_of(64).tolist() == list(range(65))
    steps = bounds_of(512)
    assert steps[0] == 0 and steps[-1] == 512 and len(steps) < 40
    assert (np.diff(steps) > 0).all()


def test_profiles_share_the_room_of_a_page(profile, monkeypatch):
    monkeypatch.setattr(packed, "MOST_CELLS", 20_000)
    alone = pack(Named("x", profile, 8, "bhlog sweep x"))
    shared = pack(Named("x", profile, 8, "bhlog sweep x"), share=4)
    assert len(shared["alphas"]) < len(alone["alphas"])
