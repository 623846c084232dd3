"""Headers of questions: what they say, what they take, what runs must have."""

import pytest

from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.question import NEEDS, find_question, pairs, parse_question, questions
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from tests.synthetic import write_run

MINE = """\
-- mine.sql
-- How many rows of
-- a layer?
--
-- n(l) is their number.
--
-- Another note.
--
-- Reads   routing (one row per run, token and layer),
--         tokens
-- Needs   token ids
-- Param   $layer integer  which layer
-- Param   $share number = 0.5
-- Param   $phase text = NULL  only this phase
-- Returns one row per run: n
-- of rows
SELECT count(*) AS n FROM routing WHERE layer = $layer; -- $share $phase
"""


def test_a_header_is_read_section_by_section():
    question = parse_question("mine", MINE)
    assert (question.name, question.text) == ("mine", MINE)
    assert question.title == "How many rows of a layer?"
    assert question.notes == "n(l) is their number.\n\nAnother note."
    assert question.reads == "routing (one row per run, token and layer), tokens"
    assert question.needs == ("token ids",)
    assert question.returns == "one row per run: n of rows"
    layer, share, phase = question.parameters
    assert (layer.name, layer.type, layer.required, layer.about) == (
        "layer", "integer", True, "which layer",
    )  # fmt: skip
    assert (share.default, share.required, share.about) == (0.5, False, "")
    assert (phase.default, phase.required, phase.about) == (None, False, "only this phase")


def test_values_are_read_by_type_and_null_is_none():
    question = parse_question("mine", MINE)
    found = question.values({"layer": "3", "share": "1e-3", "phase": "NULL"})
    assert found == {"layer": 3, "share": 0.001, "phase": None}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "mine: needs a value for layer; give it with --param layer=VALUE"),
        ({"layer": "x"}, "$layer takes an integer, got 'x'"),
        ({"layer": "1.5"}, "$layer takes an integer, got '1.5'"),
        ({"layer": "1", "share": "half"}, "$share takes a number, got 'half'"),
        ({"lyer": "1"}, "mine: no parameter 'lyer'; did you mean 'layer'?"),
        ({"zzz": "1"}, "mine: no parameter 'zzz'; it takes: layer, share, phase"),
    ],
)
def test_a_value_that_does_not_fit_gets_one_line(given, line):
    with pytest.raises(InvalidOption) as error:
        parse_question("mine", MINE).values(given)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("-- Q?\n-- Param $x float = 1", "cannot read the parameter '$x float = 1'"),
        ("-- Q?\n-- Param x integer", "cannot read the parameter 'x integer'"),
        ("-- Q?\n-- Param $x integer = one", "$x takes an integer, got 'one'"),
        ("-- Q?\n-- Needs luck", "needs 'luck'; expected one of token ids"),
    ],
)
def test_a_header_that_cannot_be_read_gets_one_line(header, line):
    with pytest.raises(InvalidOption) as error:
        parse_question("mine", f"{header}\nSELECT 1")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_a_header_is_a_question_too(tmp_path):
    (tmp_path / "bare.sql").write_text("SELECT 1 AS one")
    question = find_question(str(tmp_path / "bare.sql"))
    assert (question.title, question.parameters, question.needs) == ("", (), ())


def test_a_file_of_ones_own_may_have_the_name_of_a_question(tmp_path):
    (tmp_path / "routes.sql").write_text("SELECT 1 AS one")
    assert find_question(str(tmp_path / "routes.sql")).text == "SELECT 1 AS one"
    assert find_question("routes").title.startswith("Where do tokens go")


def test_a_file_that_is_no_text_gets_one_line(tmp_path):
    (tmp_path / "x.sql").write_bytes(b"\xff\xfe\x00")
    for name in ("x.sql", "absent.sql"):
        with pytest.raises(InvalidOption, match="cannot be read as a question") as error:
            find_question(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_mistyped_name_gets_the_nearest():
    with pytest.raises(InvalidOption, match="did you mean 'expert_load'"):
        find_question("expert_lod")
    with pytest.raises(InvalidOption, match="questions: coactivation, "):
        find_question("zzz")


def test_pairs_are_names_and_values():
    assert pairs(["a=1", "$b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    with pytest.raises(InvalidOption, match="a parameter is NAME=VALUE, got 'a'"):
        pairs(["a"])


def test_every_parameter_is_used_and_declared():
    for question in questions():
        body = "".join(f"{line}\n" for line in question.text.splitlines() if line[:2] != "--")
        for parameter in question.parameters:
            assert f"${parameter.name}" in body, (question.name, parameter.name)
            assert parameter.about, (question.name, parameter.name)
        assert body.count("$") >= len(question.parameters)


def test_what_runs_lack_is_said_by_name(tmp_path):
    shared = {"n_sequences": 1, "length": 1, "n_shards": 1}
    write_run(tmp_path / "bare", token_ids=False, n_experts=8, top_k=2, **shared)
    write_run(tmp_path / "wide", n_experts=16, **shared)
    bare, wide = (open_log(tmp_path / name) for name in ("bare", "wide"))
    with connect(bare) as one, connect([bare, wide]) as two:
        assert NEEDS["token ids"](one, "bare") == (
            "run 'bare' was captured without token ids, which this question needs"
        )
        assert NEEDS["token ids"](two, "wide") is None
        assert NEEDS["losses"](one, "bare") == (
            "run 'bare' holds no losses (nll), which this question needs"
        )
        assert NEEDS["sources"](one, "bare") is None
        assert "compares two runs" in (NEEDS["two runs"](one, "bare") or "")
        assert "different numbers of experts" in (NEEDS["two runs"](two, "bare") or "")
