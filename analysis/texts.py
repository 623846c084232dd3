"""What two runs over the same text have in common, as every comparison of two runs asks.

Tokens are matched by rank, sequence and position; those that both runs have must have the same ids.
"""

from bhlog.capture.contract.errors import InvalidOption

TOKEN = ("rank", "sequence", "position")


def other_texts(first: str, second: str) -> InvalidOption:
    """The error of two runs, named by their paths, of which a token has two ids."""
    return InvalidOption(
        f"{first} and {second} hold other texts; capture both runs from the same text with the "
        "same options"
    )
