import gc
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bhlog.analysis.replay.families as package
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.families.bh import Bh
from bhlog.analysis.replay.families.higher_criticism import HigherCriticism
from bhlog.analysis.replay.families.storey import Storey
from bhlog.analysis.replay.families.topk import TopK
from bhlog.analysis.replay.registry import families, parse_policy
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from tests.synthetic import normal_null, write_run

ALL = [
    "bh",
    "by",
    "entropy",
    "hc",
    "hc+",
    "lfdr",
    "minp",
    "seqtopk",
    "storey",
    "threshold",
    "topk",
    "topp",
]

FEWEST = '''
"""A family from outside, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.rows import Rows


@dataclass(frozen=True)
class Even(Policy):
    """The first k experts, k rounded up to an even number."""

    k: int
    step: int = 2
    name: ClassVar[str] = "even"
    parameter: ClassVar[str] = "k"
    example: ClassVar[float] = 4

    def check(self) -> None:
        pass

    def count(self, rows: Rows) -> np.ndarray:
        return np.full(len(rows), -(-self.k // self.step) * self.step)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return round(position * n_experts)
'''


def test_every_family_is_found():
    assert list(families()) == ALL


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("bh:0.3", Bh(0.3)),
        (" bh : 0.3 , max_k = 16 ", Bh(0.3, max_k=16)),
        ("topk:4,min_k=0", TopK(4, min_k=0)),
        ("storey:0.3,lambda=0.8", Storey(0.3, 0.8)),
        ("storey:1e-9", Storey(1e-9)),
        ("hc", HigherCriticism(1.0)),
        ("bh,alpha=0.2", Bh(0.2)),
    ],
)
def test_a_text_names_a_policy(text, policy):
    assert parse_policy(text) == policy


unit = st.floats(0, 1, exclude_min=True, exclude_max=True)
bounds = {
    "min_k": st.none() | st.integers(0, 3),
    "max_k": st.none() | st.integers(3, 512),
}
policies = st.one_of(
    st.builds(Bh, unit, **bounds),
    st.builds(Storey, unit, unit, **bounds),
    st.builds(TopK, st.integers(1, 512), **bounds),
    st.builds(HigherCriticism, unit, **bounds),
)


@given(policies)
def test_a_policy_is_what_its_text_says(policy):
    assert parse_policy(str(policy)) == policy


def test_the_text_without_the_parameter_names_the_curve():
    assert Storey(0.3, 0.8, max_k=9).family == "storey,max_k=9,lambda=0.8"
    assert Bh(0.3).family == Bh(0.4).family == "bh"


@pytest.mark.parametrize("name", ALL)
def test_an_open_value_has_the_example(name):
    policy = parse_policy(name, open_value=True)
    assert policy.name == name
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "policy '': expected NAME:VALUE, such as bh:0.3"),
        ("tpk:4", "policy 'tpk:4': no policy 'tpk'; did you mean 'topk'?"),
        ("BH:0.3", "did you mean 'bh'?"),
        ("nothing:1", f"policies: {', '.join(ALL)}"),
        ("bh", "policy 'bh': alpha is missing, as in bh:0.3"),
        ("bh:", "alpha must be a number, got ''"),
        ("bh:x", "policy 'bh:x': alpha must be a number, got 'x'"),
        ("bh:nan", "alpha must be between 0 and 1, got nan"),
        ("bh:1", "alpha must be between 0 and 1, got 1"),
        ("by:0", "alpha must be between 0 and 1, got 0"),
        ("topk:2.5", "k must be a whole number, got '2.5'"),
        ("topk:0", "k must be at least 1, got 0"),
        ("topp:0", "p must be above 0 and at most 1, got 0"),
        ("minp:0", "t must be above 0 and at most 1, got 0"),
        ("threshold:1", "q must be between 0 and 1, got 1"),
        ("hc:0", "beta must be above 0 and at most 1, got 0"),
        ("storey:0.3,lambda=1", "lambda must be between 0 and 1, got 1"),
        ("storey:0.3,lamda=0.5", "no option 'lamda'; did you mean 'lambda'?"),
        ("bh:0.3,16", "expected KEY=VALUE, got '16'"),
        ("bh:0.3,alpha=0.2", "alpha is given twice"),
        ("bh:0.3,max_k=4,max_k=5", "max_k is given twice"),
        ("bh:0.3,max_k=1.5", "max_k must be a whole number, got '1.5'"),
        ("bh:0.3,min_k=5,max_k=2", "max_k must be at least 1 and at least min_k (5), got 2"),
        ("bh:0.3,min_k=-1", "min_k must be at least 0, got -1"),
    ],
)
def test_a_wrong_text_is_one_line_that_says_what_is_right(text, message):
    with pytest.raises(InvalidOption) as error:
        parse_policy(text)
    assert message in str(error.value)
    assert str(error.value).startswith(f"policy '{text}'") and "\n" not in str(error.value)


@pytest.fixture
def define():
    """Defines a policy of a user's own, as a script or a notebook does, for one test."""

    sys.modules["users_script"] = ModuleType("users_script")

    def define(name, kind="Odd"):
        text = FEWEST.replace("Even", kind).replace('"even"', f'"{name}"')
        namespace = vars(sys.modules["users_script"])
        exec(text, namespace)
        return namespace[kind]

    yield define
    del sys.modules["users_script"]
    gc.collect()  # a class that is gone is no policy
    assert list(families()) == ALL


def test_a_policy_from_outside_is_compared_and_named_by_its_text(define, tmp_path):
    Odd = define("odd")
    log = open_log(write_run(tmp_path / "run"))
    frame = compare(log, [Odd(3), "odd:5,max_k=7", "odd"], experts=6)
    assert frame["policy"].unique(maintain_order=True).to_list() == ["odd:6", "odd:6,max_k=7"]
    assert frame["mean_experts"].to_list() == [6.0] * 12
    assert families()["odd"] is Odd and parse_policy("odd:3") == Odd(3)


def test_a_policy_from_outside_may_stand_on_another(define):
    @dataclass(frozen=True)
    class Half(Bh):
        """BH at half the level."""

        name: ClassVar[str] = "half"

        def count(self, rows):
            return Bh(self.alpha / 2).count(rows)

    @dataclass(frozen=True)
    class Nameless(Bh):
        """A policy that texts cannot name."""

    rows = Rows(np.random.default_rng(0).normal(0, 1, (50, 16)).astype(np.float32), normal_null(0))
    half = parse_policy("half:0.4").decide(rows).n_rejected.tolist()
    assert half == Bh(0.2).decide(rows).n_rejected.tolist()
    assert families()["bh"] is Bh
    assert half == Nameless(0.2).decide(rows).n_rejected.tolist()
    del Half, Nameless


def test_a_policy_defined_again_takes_its_own_place_and_no_other(define):
    first, second = define("odd"), define("odd")
    assert families()["odd"] is second is not first
    other = define("odd", kind="Other")
    with pytest.raises(InvalidOption, match=r"two policies are named 'odd': .*\.Odd and .*\.Other"):
        parse_policy("odd:3")
    del first, second, other


@pytest.fixture
def even(tmp_path, monkeypatch):
    """One more file in the folder of policies."""
    (tmp_path / "even.py").write_text(FEWEST)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield
    sys.modules.pop("bhlog.analysis.replay.families.even", None)
    vars(package).pop("even", None)
    gc.collect()  # a class that is gone is no policy


def test_adding_a_policy_is_one_file(even, tmp_path):
    assert "even" in families()
    policy = parse_policy("even:3,max_k=10")
    assert str(policy) == "even:3,max_k=10"
    assert policy.decide(Rows(np.zeros((2, 16), np.float32))).n_selected.tolist() == [4, 4]
    log = open_log(write_run(tmp_path / "run"))
    frame = compare(log, ["even:3", "topk:4", "even,step=3"], experts=6)
    assert frame["policy"].unique(maintain_order=True).to_list()[0] == "even:6"
    assert frame["mean_experts"].to_list() == [6.0] * 12
    with pytest.raises(InvalidOption, match="k must be a whole number"):
        parse_policy("even:x")  # its annotations are strings
