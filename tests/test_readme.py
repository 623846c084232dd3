"""Every command and every Python block of each README runs, in order, in a folder for each."""

import re

import pytest

from tests.readme import ROOT, make_folder, readmes, run, steps

pytestmark = pytest.mark.slow

STEPS = [
    pytest.param(readme, step, id=f"{readme.relative_to(ROOT)}: {step.text.splitlines()[0]}")
    for readme in readmes()
    for step in steps(readme)
]


def words(text):
    """Words and names in a text; not its numbers, which differ from machine to machine."""
    return set(re.findall(r"(?<![A-Za-z0-9_])[A-Za-z_]{3,}(?![A-Za-z0-9_])", text))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each README's reader works, by README."""
    made = {}

    def folder_of(readme):
        if readme not in made:
            made[readme] = tmp_path_factory.mktemp("readme")
            make_folder(made[readme], readme)
        return made[readme]

    return folder_of


@pytest.mark.parametrize(("readme", "step"), STEPS)
def test_the_readme_does_what_it_says(folders, readme, step):
    done = run(step, folders(readme))
    assert done.returncode == 0, f"{step.text}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{step.text} printed nothing"
    missing = words(step.shown) - words(done.stdout)
    assert not missing, f"{step.text} does not print {missing}:\n{done.stdout}"
