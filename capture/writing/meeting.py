"""How the ranks of one launch agree on the run that they write: rank 0 makes it and tells the rest.

Never by clocks, which differ between machines. A launch is known by a store that its processes
share: that of torch's process group, or of torchrun's agent. Without one, by a text that they all
find in their environment, which rank 0 writes into the manifest and the others read there.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from bhlog.capture.contract.errors import InvalidOption, RunExists, WriterFailed
from bhlog.capture.contract.manifest import manifest_name
from bhlog.capture.writing.launch import process_group
from bhlog.capture.writing.place import Place

RANK_WAIT_SECONDS = 60.0
LAUNCH = "BHLOG_LAUNCH"  # where a user may name a launch that nothing else tells apart


class Meeting(ABC):
    """Where rank 0 says which run it made, and the others hear it.

    Attributes:
        launch: what the manifest says of the launch; None where a store tells.
    """

    launch: str | None = None

    @classmethod
    def of(cls, place: Place, rank: int) -> "Meeting":
        """The meeting of this launch's ranks over the place of a run.

        Raises:
            InvalidOption: nothing tells which launch this rank, which is not 0, belongs to.
        """
        store = _shared_store()
        if store is not None:
            return _Store.over(store, place, rank)
        launch = launch_name()
        if launch is None and rank > 0:
            raise InvalidOption(
                f"{place}: this is rank {rank}, but of which launch is not known, and so not "
                f"which run to join; start with torchrun, or set {LAUNCH} to a text that the "
                "processes of this launch share and no other launch has"
            )
        return _Folder(place, launch)

    @abstractmethod
    def announce(self, run_id: str) -> None:
        """Say that the run is there."""

    @abstractmethod
    def refuse(self, why: str) -> None:
        """Say that there will be none."""

    @abstractmethod
    def join(self) -> str:
        """Wait for rank 0; the id of the run that it made.

        Raises:
            RunExists: it made none, or the run there is of another launch.
            WriterFailed: nothing was heard of it.
        """


@dataclass(frozen=True)
class _Store(Meeting):
    """A key-value store that the ranks share."""

    key: str
    set: Callable[[str, str], Any]
    get: Callable[[str], str]

    @classmethod
    def over(cls, store: Any, place: Place, rank: int) -> "_Store":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        where = place.folder.resolve() if place.store is None else place
        name = f"bhlog/{attempt}/{where}"
        turn = store.add(f"{name}/{rank}", 1)  # a folder may be used again after it was removed
        return cls(f"{name}/run{turn}", store.set, lambda key: _wait_and_get(store, key))

    def announce(self, run_id: str) -> None:
        self.set(self.key, f"made {run_id}")

    def refuse(self, why: str) -> None:
        self.set(self.key, f"refused {why}")

    def join(self) -> str:
        word, _, rest = self.get(self.key).partition(" ")
        if word == "refused":
            raise RunExists(f"rank 0 made no run: {rest}")
        return rest


@dataclass(frozen=True)
class _Folder(Meeting):
    """The run's folder, whose manifest names the launch."""

    place: Place
    launch: str | None

    def announce(self, run_id: str) -> None:
        """Nothing to do: the manifest is there."""

    def refuse(self, why: str) -> None:
        """Nothing to do: the others will find no manifest of this launch."""

    def join(self) -> str:
        path = f"{self.place}/{manifest_name(0)}"
        deadline = time.monotonic() + RANK_WAIT_SECONDS
        while True:
            leader = self.place.manifest(0)
            if leader is not None and leader.launch == self.launch:
                return leader.run_id
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if leader is None:
            raise WriterFailed(f"{path}: rank 0 wrote no manifest in {RANK_WAIT_SECONDS:.0f} s")
        raise RunExists(
            f"{path}: a run of another launch ({leader.launch}; this is {self.launch}); choose "
            "another folder, remove it, or continue a broken capture with --resume"
        )


def launch_name() -> str | None:
    """What the environment calls this launch: by our own variable, Slurm's step, or PMIx's job."""
    named = os.environ.get(LAUNCH)
    if named:
        return named
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ:
        return f"slurm {os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    if "PMIX_NAMESPACE" in os.environ:
        return f"pmix {os.environ['PMIX_NAMESPACE']}"
    return None


def _shared_store() -> Any | None:
    """The store of the process group, or of torchrun's agent; None where there is neither."""
    if process_group() is not None:
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=RANK_WAIT_SECONDS))


def _wait_and_get(store: Any, key: str) -> str:
    try:
        store.wait([key], timedelta(seconds=RANK_WAIT_SECONDS))
    except RuntimeError as error:
        raise WriterFailed(
            f"rank 0 started no run in {RANK_WAIT_SECONDS:.0f} s: {key.removeprefix('bhlog/')}"
        ) from error
    text: str = store.get(key).decode()
    return text
