"""What two runs over the same text have in common, as every comparison of two runs asks.

Tokens are matched by rank, sequence and position; those that both runs have must have the same ids,
and one of the runs must have every token of the other.
"""

from bhlog.capture.contract.errors import InvalidOption

TOKEN = ("rank", "sequence", "position")


_SAME = "capture both runs from the same text with the same options"


def other_texts(first: str, second: str) -> InvalidOption:
    """The error of two runs, named by their paths, of which a token has two ids."""
    return InvalidOption(f"{first} and {second} hold other texts; {_SAME}")


def tokens_missing(missing: int, tokens: int, run: str, other: str) -> InvalidOption:
    """The error of a run, named by its path, of whose tokens some are not in another."""
    return InvalidOption(f"{missing:,} of {tokens:,} tokens of {run} are not in {other}; {_SAME}")
