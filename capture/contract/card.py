"""The card of a run: its README.md, by which datasets.load_dataset(RUN) finds its tables."""

from pathlib import Path

from bhlog.capture.contract.files import whole_file

CARD_NAME = "README.md"
CARD = """---
configs:
- config_name: routing
  data_files: routing/*.parquet
  default: true
- config_name: tokens
  data_files: tokens/*.parquet
---

A run of bhlog: `routing` has a row per token and layer, `tokens` a row per token, `run.json` says
what was run. `bhlog info` describes it, `bhlog sql` asks it, `bhlog verify` says whether it is
whole.
"""


def write_card(run: Path) -> None:
    """Write the card into a run's folder."""
    with whole_file(run / CARD_NAME) as file:
        file.write(CARD.encode())


def is_card(path: Path) -> bool:
    """Whether a file is the card as it was written, and nobody's own text."""
    return path.name == CARD_NAME and path.read_bytes() == CARD.encode()
