"""run.json: what a run is, how it was routed, and what it holds."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from bhlog.capture.contract.errors import CorruptManifest, NewerLog, RouterLogError, one_line
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.schema import MAJOR_VERSION, SCHEMA_VERSION, SHARD_NAME

MANIFEST_NAME = "run.json"
MOST_MANIFEST_BYTES = 1 << 26
_CHECKSUM = "checksum"  # key of run.json: sha256 of the rest

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]  # sums of many ranks fit 64 bits
Layer = Annotated[int, Meta(ge=0, lt=1 << 16)]
Experts = Annotated[int, Meta(ge=1, lt=1 << 16)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


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
    layers: Annotated[tuple[Layer, ...], Meta(min_length=1)]
    n_experts: Experts
    top_k: Experts
    norm_topk_prob: bool
    scoring: str = "softmax"
    scale: float = 1.0
    dtype: str = "float32"


@dataclass(frozen=True)
class Routing:
    """How experts were chosen: by the model itself ("native") or by a policy with these options.

    The kind is the policy's family: "bh" or another of bhlog.capture.contract.named.ROUTED.
    """

    kind: str = "native"
    options: BhOptions | None = None
    kde_sha256: Sha256 | None = None

    @classmethod
    def by(cls, options: BhOptions) -> "Routing":
        """Routing by the policy of these options."""
        return cls(options.named.name, options)

    def __post_init__(self) -> None:
        if self.kind != ("native" if self.options is None else self.options.named.name):
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

    rows: Count = 0
    tokens: Count = 0
    shards: Count = 0
    forwards: Count = 0
    sampled_out: Count = 0
    dropped: Count = 0
    nonfinite: Count = 0
    rejected: Count = 0

    def __add__(self, other: "Totals") -> "Totals":
        mine, theirs = asdict(self), asdict(other)
        return Totals(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class Seal:
    """What a Parquet file was when it was written; its pages carry checksums of their own.

    Attributes:
        bytes: its size.
        rows: its rows.
        footer: sha256 of its footer, with the length and magic after it.
    """

    bytes: Count
    rows: Count
    footer: Sha256


@dataclass(frozen=True)
class ShardEntry:
    """A sealed pair of shards: routing/NAME and tokens/NAME.

    Attributes:
        name: file name, the same in both folders.
        rows, tokens: rows of the two files.
        bytes: size of the two files together.
        routing_seal, tokens_seal: what the two files were; None in runs of earlier bhlogs.
    """

    name: str
    rows: Count
    tokens: Count
    bytes: Count
    routing_seal: Seal | None = None
    tokens_seal: Seal | None = None

    def __post_init__(self) -> None:
        if not SHARD_NAME.fullmatch(self.name):
            raise CorruptManifest(f"shard name {self.name!r} is not of the form rank00000-00000")


@dataclass(frozen=True)
class Origin:
    """How a run came to be.

    Attributes:
        command: words of the command line that made it, without secrets; see
            bhlog.capture.contract.uris.
        commit: of the git repository that the command ran in, ending in "-dirty" where files in it
            were changed; None outside of one.
        texts: sha256 of each text file by its source.
        tokenizer: folder or hub name of the tokenizer, "bytes" for a token a byte; None if unknown.
    """

    command: tuple[str, ...] = ()
    commit: str | None = None
    texts: dict[str, Sha256] = field(default_factory=dict)
    tokenizer: str | None = None


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
        logits: whether logits were logged; a run without them has decisions alone.
        versions: of bhlog, torch, transformers, ...
        totals: counts, complete once closed.
        shards: sealed shards, complete once closed.
        error: why the capture ended early, if it did.
        options: other options of the capture, as given; of another engine's log, which `engine` it
            was and what else it told, such as `expert_bytes` by layer.
        origin: how it came to be; None for runs of earlier bhlogs.
        launch: what the environment called the launch that made the run, where no store of its
            processes told them apart; see capture.writing.meeting.
        ranks: processes of that launch, each of which writes a manifest and shards of its own.
        schema_version, schema_major: see capture.contract.schema.
    """

    run_id: str
    created: str
    model: ModelInfo
    routing: Routing
    closed: str | None = None
    sample_every: Annotated[int, Meta(ge=1, lt=1 << 32)] = 1
    token_ids: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    totals: Totals = Totals()
    shards: tuple[ShardEntry, ...] = ()
    error: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    logits: bool = True
    origin: Origin | None = None
    launch: str | None = None
    ranks: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    schema_version: Annotated[int, Meta(ge=1)] = SCHEMA_VERSION
    schema_major: Annotated[int, Meta(ge=1)] = MAJOR_VERSION

    def to_json(self) -> str:
        """The text of run.json, with a checksum of what it says."""
        data = json.loads(json.dumps(asdict(self)))
        data[_CHECKSUM] = _checksum(data)
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> "Manifest":
        """Read run.json; name says in errors where it came from.

        Fields that a newer version of the same major version added are passed over.

        Raises:
            CorruptManifest: not JSON, of a newer major version, or a field is missing, unknown, of
                another type or impossible.
        """
        try:
            if len(text) > MOST_MANIFEST_BYTES:
                raise CorruptManifest(f"larger than {MOST_MANIFEST_BYTES >> 20} MiB")
            data = msgspec.json.decode(text)
            version = _check_version(data)
            checksum = data.pop(_CHECKSUM, None)
            if checksum not in (None, _checksum(data)):
                raise CorruptManifest("it does not have its checksum: restore it from a copy")
            manifest = msgspec.convert(data, cls)
            unknown = _unknown(data, asdict(manifest)) if version <= SCHEMA_VERSION else None
            if unknown:
                raise CorruptManifest(f"unknown field `{unknown}`")
            manifest._check()
            return manifest
        except NewerLog as error:
            raise NewerLog(f"{name}: {error}") from None
        except (ValueError, RecursionError, RouterLogError) as error:  # msgspec's are ValueErrors
            raise CorruptManifest(
                f"{name}: not a manifest of a bhlog run ({one_line(str(error))})"
            ) from error

    def _check(self) -> None:
        """What holds between fields: a manifest may come from a stranger."""
        model = self.model
        if list(model.layers) != sorted(set(model.layers)):
            raise CorruptManifest(f"layers {model.layers} do not rise")
        if model.top_k > model.n_experts:
            raise CorruptManifest(f"top_k is {model.top_k} of {model.n_experts} experts")
        if self.routing.options is not None:
            self.routing.options.bounds(model.n_experts)
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise CorruptManifest("a shard is listed twice")
        for time in filter(None, (self.created, self.closed)):
            if datetime.fromisoformat(time).tzinfo is None:
                raise CorruptManifest(f"{time} does not say its time zone")

    def write(self, folder: Path, rank: int = 0) -> None:
        """Write the manifest of one rank into the run's folder, whole or not at all."""
        with whole_file(folder / manifest_name(rank)) as file:
            file.write(self.to_json().encode())


def _checksum(data: dict[str, Any]) -> str:
    """Sha256 of what a manifest says, in hex digits, however its JSON is spaced."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_version(data: object) -> int:
    """The schema version of a manifest that this bhlog reads."""
    if not isinstance(data, dict):
        raise CorruptManifest("it is no JSON object")
    version, major = data.get("schema_version"), data.get("schema_major", 1)
    if type(version) is not int or type(major) is not int:
        raise CorruptManifest(f"schema version {version!r}, major version {major!r}")
    if major > MAJOR_VERSION:
        raise NewerLog(
            f"a log of major version {major}; this bhlog reads major version {MAJOR_VERSION}: "
            "read it with the bhlog that wrote it"
        )
    return version


def _unknown(found: object, known: object) -> str | None:
    """The first key anywhere in `found` that `known` has not."""
    if isinstance(found, dict) and isinstance(known, dict):
        strange = [key for key in found if key not in known]
        inside = (_unknown(found[key], known[key]) for key in found if key in known)
        return strange[0] if strange else next(filter(None, inside), None)
    if isinstance(found, list) and isinstance(known, tuple):
        pairs = zip(found, known, strict=True)
        return next(filter(None, (_unknown(*pair) for pair in pairs)), None)
    return None


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
