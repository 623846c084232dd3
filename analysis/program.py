"""The program `bhlog`: Ctrl-C is answered in one line while the rest of it is being loaded, too."""

from bhlog.analysis.interrupts import at_once, by_default

at_once()
from bhlog.analysis import cli  # noqa: E402


def main() -> None:
    """Run the command that the program's arguments name."""
    by_default()
    cli.main()
