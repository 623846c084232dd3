"""The description of the files is of the files that the code writes."""

from tests.formats import tables, written


def test_the_tables_of_columns_are_those_of_the_code():
    assert written() == tables(), "run python -m tests.formats"
