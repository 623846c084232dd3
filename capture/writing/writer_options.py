"""How a run is written."""

import os
from dataclasses import dataclass, field
from typing import Literal

from bhlog.capture.contract.errors import InvalidOption


@dataclass(frozen=True)
class WriterOptions:
    """How a run is written.

    Attributes:
        sample_every: log the tokens whose position is a multiple of it, at every layer.
        token_ids: whether token ids are logged.
        shard_rows: rows after which a shard is sealed.
        seal_seconds: a shard is sealed before that when its first row is so old, or older than a
            twentieth of the run's time if that is more: a kill loses little, and a long run that
            logs slowly still gets few shards. Infinity seals by rows alone.
        queue_bytes: most bytes that wait to be gathered before `on_full` applies; beside them,
            memory holds one shard that fills and `threads` that are being encoded.
        on_full: "block" makes the model wait, "drop" leaves tokens out and counts them.
        store_seconds: how long an object store that does not take a file is asked again before
            writing stops; meanwhile up to `queue_bytes` of sealed shards wait on disk, then
            `on_full` applies.
        staging: folder on this machine for what waits for an object store; None is
            ~/.cache/bhlog/staging (in XDG_CACHE_HOME where that is set).
        threads: shards encoded at once; by default 2, and up to 4 where there are cores to spare.
    """

    sample_every: int = 1
    token_ids: bool = True
    shard_rows: int = 1 << 18
    seal_seconds: float = 30.0
    queue_bytes: int = 1 << 28
    on_full: Literal["block", "drop"] = "block"
    store_seconds: float = 300.0
    staging: str | None = None
    threads: int = field(default_factory=lambda: min(4, max(2, (os.cpu_count() or 2) // 4)))

    def __post_init__(self) -> None:
        for name in ("sample_every", "shard_rows", "queue_bytes", "threads"):
            if getattr(self, name) < 1:
                raise InvalidOption(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seal_seconds", "store_seconds"):
            if not getattr(self, name) > 0:
                raise InvalidOption(f"{name} must be above 0, got {getattr(self, name)}")
        if self.on_full not in ("block", "drop"):
            raise InvalidOption(f"on_full must be 'block' or 'drop', got {self.on_full!r}")
