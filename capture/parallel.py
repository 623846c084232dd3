"""Which ranks of a launch see the same tokens: of those, one writes.

Ranks of a tensor, expert or pipeline parallel group are fed alike, and a row is one token at one
layer; ranks with other data write each. The library says which are which by the model's device
mesh. What ranks tell each other goes through the store of the process group, on every backend.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import nn

from bhlog.capture.contract.errors import InvalidOption, RouterLogError, WriterFailed
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.writing.launch import process_group, rank, world_size

T = TypeVar("T")

WAIT_SECONDS = 120.0
_SAME_TOKENS = ("tp", "ep", "pp", "tensor", "expert", "pipe")  # what names of dimensions begin with
_OTHER_DATA = ("dp", "ddp", "fsdp", "hsdp", "data", "replicate", "shard", "efsdp")


@dataclass(frozen=True)
class Group:
    """The ranks of a launch that see the same tokens as this one.

    Attributes:
        ranks: in the launch, rising; the first one writes.
        rank: of this process in the launch.
        number: of this group among those of the launch, from 0: the rank of its rows in the log.
        count: groups of the launch.
    """

    ranks: tuple[int, ...]
    rank: int
    number: int
    count: int

    @classmethod
    def of(cls, model: nn.Module) -> "Group":
        """The group of this rank, for a model.

        Every rank of the launch asks at once, if the model has a mesh.

        Raises:
            InvalidOption: a dimension of the mesh is of a kind that is not known.
            RouterLogError: the ranks say different things, or one says nothing.
        """
        mesh, me = _mesh(model), rank()
        if mesh is None:
            return cls((me,), me, me, world_size())
        said = _exchange("group", ",".join(map(str, _same_tokens(mesh))), range(world_size()))
        groups = {r: tuple(map(int, text.split(","))) for r, text in said.items()}
        if any(r not in group or groups.get(r) != groups[group[0]] for r, group in groups.items()):
            raise RouterLogError(
                f"the ranks do not agree which of them see the same tokens: {groups}; load the "
                "model on all of them in the same way"
            )
        numbers = sorted(set(groups.values()))
        return cls(groups[me], me, numbers.index(groups[me]), len(numbers))

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of its group that writes."""
        return self.rank == self.ranks[0]

    def check_alike(self, routing: Routing, thresholds: Iterable[bytes]) -> None:
        """Raise unless all ranks of the group route alike, to the bit.

        Args:
            thresholds: float32 of each router.

        Raises:
            InvalidOption: they do not.
        """
        if len(self.ranks) == 1:
            return
        digest = hashlib.sha256(repr((routing.kind, routing.options)).encode())
        for bits in thresholds:
            digest.update(bits)
        said = _exchange(f"thresholds {self.number}", digest.hexdigest(), self.ranks)
        if len(set(said.values())) > 1:
            raise InvalidOption(
                f"ranks {', '.join(map(str, self.ranks))} see the same tokens and would route them "
                "by different thresholds; give all of them the same null model and options"
            )

    def once(self, write: Callable[[], tuple[T, str]]) -> tuple[T | None, str]:
        """Have the rank that writes do something that may fail; the others hear how it went.

        Args:
            write: what the writing rank does; gives its result, and what the others hear.

        Returns:
            The result, None on the other ranks, and what was told.

        Raises:
            RouterLogError: on every rank, if the writing rank failed.
        """
        if len(self.ranks) == 1:
            return write()
        turn, leader = f"once {self.number}", self.ranks[:1]
        if not self.writes:
            word, _, rest = _exchange(turn, None, leader)[leader[0]].partition(" ")
            if word == "failed":
                raise RouterLogError(f"rank {leader[0]} made no run: {rest}")
            return None, rest
        try:
            made, told = write()
        except BaseException as error:
            _exchange(turn, f"failed {error}", leader)
            raise
        _exchange(turn, f"made {told}", leader)
        return made, told


def _mesh(model: nn.Module) -> Any | None:
    """The device mesh that the library spread a model over; None if it did not."""
    if process_group() is None:
        return None
    meshes = (getattr(module, "_device_mesh", None) for module in model.modules())
    return next((mesh for mesh in meshes if mesh is not None), None)


def _same_tokens(mesh: Any) -> list[int]:
    """Ranks that share this one's place in every dimension of a mesh that splits the data.

    Raises:
        InvalidOption: a dimension is of no known kind.
    """
    names = mesh.mesh_dim_names or ("tp",) * mesh.ndim
    place: list[Any] = []
    for name, here in zip(names, mesh.get_coordinate(), strict=True):
        if name.startswith(_OTHER_DATA):
            place.append(here)
        elif name.startswith(_SAME_TOKENS):
            place.append(slice(None))
        else:
            raise InvalidOption(
                f'the model is spread over a mesh ({", ".join(names)}) whose dimension "{name}" is '
                "not known: whether its ranks see the same tokens or others; expected "
                f"{', '.join((*_SAME_TOKENS[:3], *_OTHER_DATA[:3]))}"
            )
    return sorted(int(r) for r in mesh.mesh[tuple(place)].reshape(-1).tolist())


def _exchange(what: str, mine: str | None, ranks: Iterable[int]) -> dict[int, str]:
    """Say something, unless it is None, and hear what these ranks say at the same turn.

    Raises:
        WriterFailed: one says nothing.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store, me = _get_default_store(), rank()
    turn = store.add(f"bhlog/turn/{what}/{me}", 1)
    if mine is not None:
        store.set(f"bhlog/{what}/{turn}/{me}", mine)
    said: dict[int, str] = {}
    for other in ranks:
        key = f"bhlog/{what}/{turn}/{other}"
        try:
            store.wait([key], timedelta(seconds=WAIT_SECONDS))
        except RuntimeError as error:
            raise WriterFailed(
                f"rank {other} said nothing in {WAIT_SECONDS:.0f} s ({what}): all ranks of a "
                "launch observe or route the model at once"
            ) from error
        said[other] = store.get(key).decode()
    return said
