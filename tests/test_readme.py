"""Every command and every Python block of the README runs, in order, in one folder."""

import re

import pytest

from tests.readme import make_texts, run, steps


def words(text):
    """Words and names in a text; not its numbers, which differ from machine to machine."""
    return set(re.findall(r"(?<![A-Za-z0-9_])[A-Za-z_]{3,}(?![A-Za-z0-9_])", text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's reader works."""
    path = tmp_path_factory.mktemp("readme")
    make_texts(path)
    return path


@pytest.mark.parametrize("step", [pytest.param(s, id=s.text.split("\n")[0]) for s in steps()])
def test_the_readme_does_what_it_says(folder, step):
    done = run(step, folder)
    assert done.returncode == 0, f"{step.text}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{step.text} printed nothing"
    missing = words(step.shown) - words(done.stdout)
    assert not missing, f"{step.text} does not print {missing}:\n{done.stdout}"
