"""What the READMEs name is there: files, folders, links and headings."""

import re

import pytest

from tests.readme import FIRST, ROOT, readmes


def anchors(text):
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme):
    text = readme.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):  # there is no network here
            continue
        path, _, anchor = target.partition("#")
        page = (readme.parent / path).resolve() if path else readme
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), target


def test_every_page_is_linked_from_the_first():
    text = FIRST.read_text(encoding="utf-8")
    for readme in readmes()[1:]:
        assert f"]({readme.relative_to(ROOT)})" in text, f"{readme} is linked from nowhere"


def test_a_stranger_reads_250_lines():
    assert len(FIRST.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_files_on_a_logits_way_exist():
    section = FIRST.read_text(encoding="utf-8").split("## A logit's way")[1].split("\n## ")[0]
    folder = ROOT
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", section):
        path = ROOT / name if "/" in name else folder / name  # a name alone: where the last was
        assert path.exists(), name
        folder = path if path.is_dir() else path.parent
