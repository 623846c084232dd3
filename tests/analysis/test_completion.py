"""Tab: paths are the shell's, names are ours; options that fill bundles complete too."""

import pytest
from click.shell_completion import BashComplete

from bhlog.analysis.cli import bhlog
from bhlog.analysis.database.question import questions
from bhlog.analysis.figures.registry import figures
from bhlog.analysis.replay.registry import families


def completed(*arguments, word=""):
    """(type, value) of what Tab offers for a word after these arguments."""
    shell = BashComplete(bhlog, {}, "bhlog", "_BHLOG_COMPLETE")
    return [(item.type, item.value) for item in shell.get_completions(list(arguments), word)]


def names(*arguments, word=""):
    found = completed(*arguments, word=word)
    assert {kind for kind, _ in found} == {"plain"}
    return [value for _, value in found]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["replay"], "file"),
        (["sweep", "a"], "file"),
        (["verify"], "file"),
        (["fidelity", "a"], "file"),
        (["sql"], "file"),
        (["kde", "fit"], "file"),
        (["kde", "check", "null.parquet"], "file"),
        (["kde", "import"], "dir"),
        (["compare", "a", "--kde"], "file"),
        (["compare", "a", "--figure"], "file"),
        (["replay", "a", "--out"], "dir"),
        (["replay", "a", "--table"], "file"),
        (["sweep", "a", "--save"], "file"),
        (["plot", "a", "--out"], "dir"),
        (["capture"], "dir"),
        (["capture", "demo", "--text"], "file"),
        (["capture", "demo", "--out"], "dir"),
        (["capture", "demo", "--fit-kde"], "file"),
        (["demo", "--out"], "dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_paths_are_completed_by_the_shell(arguments, kind):
    assert completed(*arguments, word="ru") == [(kind, "ru")]


def test_names_are_completed_by_bhlog():
    assert names("sql", "a", "--query") == [question.name for question in questions()]
    assert names("sql", "a", "--query", word="experts_per") == ["experts_per_token"]
    assert names("plot", "a") == list(figures())
    assert names("plot", "a", "step_up", word="exp") == ["expert_heatmap", "experts_histogram"]
    assert names("compare", "a", "--policy") == [f"{name}:" for name in families()]
    assert "routing" in names("sql", "--describe", word="ro")
    assert names("sweep", "a", "--format") == ["table", "json", "csv", "markdown", "parquet"]
    assert names("kde", "fit", "a", "--kernel", word="g") == ["gaussian"]


def test_a_question_may_be_a_file():
    assert completed("sql", "a", "--query", word="./mine") == [("file", "./mine")]


def test_commands_and_options_are_completed():
    assert names(word="re") == ["replay", "report"]
    assert names("sweep", "a", word="--exp") == ["--experts"]
    assert completed("sweep", "a", word="--target") == []  # the old name is hidden
