"""Which of the processes of a launch this one is: as the process group or torchrun says."""

import os
import sys
from typing import Any


def rank() -> int:
    """This process's number, from 0."""
    group = process_group()
    return int(os.environ.get("RANK", "0") if group is None else group.get_rank())


def world_size() -> int:
    """Processes of the launch."""
    group = process_group()
    return int(os.environ.get("WORLD_SIZE", "1") if group is None else group.get_world_size())


def process_group() -> Any | None:
    """torch.distributed where this process is in a process group.

    Who has not imported torch is in none; importing it to ask would take seconds.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return None
    return torch.distributed if torch.distributed.is_initialized() else None
