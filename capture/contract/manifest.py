"""run.json: what a run is, how it was routed, and what it holds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bhlog.capture.contract.errors import CorruptManifest, RouterLogError
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.schema import SCHEMA_VERSION, SHARD_NAME

MANIFEST_NAME = "run.json"


@dataclass(frozen=True)
class ModelInfo:
    """The model that was run, as far as its routing is concerned.

    Attributes:
        name: folder or hub name it was loaded from.
        class_name: its Python class.
        revision: commit of the hub revision, if known.
        layers: decoder layers that have a router, rising.
        n_experts: experts per router (E).
        top_k: experts per token under the model's own routing.
        norm_topk_prob: whether the model makes the chosen weights sum to 1.
        scoring: how logits become weights: "softmax" or "sigmoid".
        scale: factor on the weights, 1 for most.
        dtype: of the parameters.
    """

    name: str
    class_name: str
    revision: str | None
    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    norm_topk_prob: bool
    scoring: str = "softmax"
    scale: float = 1.0
    dtype: str = "float32"


@dataclass(frozen=True)
class Routing:
    """How experts were chosen: by the model itself ("native") or by BH with these options."""

    kind: Literal["native", "bh"] = "native"
    options: BhOptions | None = None
    kde_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("native", "bh") or (self.kind == "bh") != (self.options is not None):
            raise CorruptManifest(f"routing kind {self.kind!r} with options {self.options}")


@dataclass(frozen=True)
class Totals:
    """Counts over a run, or over one rank of it.

    Attributes:
        rows: (token, layer) rows written.
        tokens: tokens written.
        shards: shard pairs written.
        forwards: forward passes seen.
        sampled_out: tokens left out by sampling.
        dropped: tokens dropped because the queue was full (`drop` mode).
        nonfinite: rows with a NaN or infinite logit, written as they are.
        rejected: tokens of drafts that assisted decoding rejected, never written.
    """

    rows: int = 0
    tokens: int = 0
    shards: int = 0
    forwards: int = 0
    sampled_out: int = 0
    dropped: int = 0
    nonfinite: int = 0
    rejected: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        mine, theirs = asdict(self), asdict(other)
        return Totals(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class ShardEntry:
    """A sealed pair of shards: routing/NAME and tokens/NAME.

    Attributes:
        name: file name, the same in both folders.
        rows, tokens: rows of the two files.
        bytes: size of the two files together.
    """

    name: str
    rows: int
    tokens: int
    bytes: int

    def __post_init__(self) -> None:
        if not SHARD_NAME.fullmatch(self.name):
            raise CorruptManifest(f"shard name {self.name!r} is not of the form rank00000-00000")


@dataclass(frozen=True)
class Manifest:
    """Everything a reader needs to know of a run besides its rows. It holds no text.

    Attributes:
        run_id: 32 hex digits, unique to the run.
        created, closed: UTC times in ISO 8601; closed is None while the run is open or when the
            capture died.
        model, routing: what was run and how it was routed.
        sample_every: the tokens whose position is a multiple of it were logged.
        token_ids: whether token ids were logged.
        versions: of bhlog, torch, transformers, ...
        totals: counts, complete once closed.
        shards: sealed shards, complete once closed.
        error: why the capture ended early, if it did.
        options: other options of the capture, as given.
    """

    run_id: str
    created: str
    model: ModelInfo
    routing: Routing
    closed: str | None = None
    sample_every: int = 1
    token_ids: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    totals: Totals = Totals()
    shards: tuple[ShardEntry, ...] = ()
    error: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of run.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> "Manifest":
        """Read run.json; name says in errors where it came from.

        Raises:
            CorruptManifest: not JSON, another schema version, or fields missing or unknown.
        """
        try:
            data = json.loads(text)
            version = data.get("schema_version")
            if version != SCHEMA_VERSION:
                raise CorruptManifest(
                    f"schema version {version}; this bhlog reads version {SCHEMA_VERSION}"
                )
            model, routing = data["model"], data["routing"]
            options = routing["options"]
            manifest = cls(
                **{
                    **data,
                    "model": ModelInfo(**{**model, "layers": tuple(model["layers"])}),
                    "routing": Routing(**{**routing, "options": options and BhOptions(**options)}),
                    "totals": Totals(**data["totals"]),
                    "shards": tuple(ShardEntry(**entry) for entry in data["shards"]),
                }
            )
            manifest._check_counts()
            return manifest
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            RouterLogError,
        ) as error:
            raise CorruptManifest(
                f"{name}: not a manifest of a bhlog run ({type(error).__name__}: {error})"
            ) from error

    def _check_counts(self) -> None:
        """Numbers that readers build arrays and tables by: a manifest may come from a stranger."""
        model, large = asdict(self.model), asdict(self.totals)
        small = {"n_experts": model["n_experts"], "top_k": model["top_k"]}
        small |= {f"layer {i}": layer for i, layer in enumerate(model["layers"])}
        for shard in self.shards:
            large |= {
                f"{name} of {shard.name}": getattr(shard, name)
                for name in ("rows", "tokens", "bytes")
            }
        for limit, counts in ((2**16, small), (2**63, large)):
            for name, count in counts.items():
                if type(count) is not int or not 0 <= count < limit:
                    raise CorruptManifest(f"{name} is {count!r}, expected 0 to {limit - 1}")
        if not isinstance(self.run_id, str):
            raise CorruptManifest(f"run_id is {self.run_id!r}, expected text")
        if not isinstance(self.versions, dict):
            raise CorruptManifest(f"versions is {self.versions!r}, expected names and versions")

    def write(self, folder: Path, rank: int = 0) -> None:
        """Write the manifest of one rank into the run's folder, whole or not at all."""
        with whole_file(folder / manifest_name(rank)) as file:
            file.write(self.to_json().encode())


def manifest_name(rank: int) -> str:
    """File name of a rank's manifest: run.json for rank 0, run.rank00001.json for others."""
    return MANIFEST_NAME if rank == 0 else f"run.rank{rank:05d}.json"


def merge_manifests(ranks: Sequence[Manifest]) -> Manifest:
    """The manifest of a run from those of its ranks: facts of the first, sums of all."""
    first, *others = ranks
    totals = first.totals
    for other in others:
        totals = totals + other.totals
    return replace(
        first,
        totals=totals,
        closed=None if any(r.closed is None for r in ranks) else max(r.closed or "" for r in ranks),
        shards=tuple(sorted((s for r in ranks for s in r.shards), key=lambda s: s.name)),
        error=next((r.error for r in ranks if r.error), None),
    )
