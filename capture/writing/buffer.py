"""Rows on their way from a forward to a shard: blocks come in, columns of Parquet go out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from bhlog.capture.contract.errors import InvalidOption, UnsupportedModel
from bhlog.capture.contract.manifest import Totals
from bhlog.capture.contract.schema import (
    COLUMNS,
    SCHEMA_VERSION,
    TEXT,
    routing_schema,
    tokens_schema,
)
from bhlog.capture.contract.shard_rows import decided, identity, table
from bhlog.capture.writing.stage import Staged

BY_LAYER = ("logits", "experts", "weights", "n_selected", "n_rejected")
TEXT_COLUMNS = tuple(column.name for column in COLUMNS["tokens"] if column.type == TEXT)
_NO_TOKEN_ID = -1
_ENOUGH = 16  # tokens of a buffer whose logits are looked at
_FEWEST = 4  # rows that sum to 1 by chance in one of 1e15 buffers
_ROUNDING = 0.02  # of a sum of bfloat16


@dataclass(frozen=True, eq=False)
class Texts:
    """A text column of a block.

    Attributes:
        code: (R,) int32 index into names, -1 for unknown.
        names: what the codes stand for.
    """

    code: NDArray[np.int32]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one or several forwards, on their way to a shard.

    R rows (tokens), L layers, K slots. Tensors of `staged`: logits (L, R, E) in the router's
    dtype; experts (L, R, K) and weights (L, R, K) by falling choice; n_selected and n_rejected
    (L, R) under BH; position (R,), keep (R,) bool; token_id (R,) and nll (R,) if known.

    Attributes:
        staged: the tensors.
        layers: (L,) decoder layers.
        sequence, forward: (R,) uint32.
        phase: (R,) int8 index into PHASES.
        parent: (R,) int64 sequence that the row's own left, -1 for none; None if none did.
        texts: of TEXT_COLUMNS, those that are known.
        rejected: tokens of rejected drafts among the rows, which are not kept.
    """

    staged: Staged
    layers: tuple[int, ...]
    sequence: NDArray[np.uint32]
    forward: NDArray[np.uint32]
    phase: NDArray[np.int8]
    parent: NDArray[np.int64] | None = None
    texts: Mapping[str, Texts] = field(default_factory=dict)
    rejected: int = 0


@dataclass(eq=False)
class Buffer:
    """Rows that wait for their shard.

    Attributes:
        rank: noted in every row.
        version: schema version of the run.
        layers: decoder layers; the same in every block.
        tokens: rows of the tokens shard so far; the routing shard has as many at each layer.
    """

    rank: int
    version: int = SCHEMA_VERSION
    layers: tuple[int, ...] = ()
    tokens: int = 0
    _by_layer: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    _identity: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    _names: dict[str, dict[str, int]] = field(default_factory=dict)  # code of each, by column

    @property
    def rows(self) -> int:
        """Rows of the routing shard so far."""
        return self.tokens * len(self.layers)

    def add(self, block: Block, *, sample_every: int, token_ids: bool) -> Totals:
        """Take the rows of a block that are logged; the block's tensors may be reused afterwards.

        Args:
            block: its copies are done.
            sample_every: take the tokens whose position is a multiple of it.
            token_ids: whether token ids are kept.

        Returns:
            What the block adds to the counts.
        """
        tensors = block.staged.tensors
        logged, n_kept = logged_rows(tensors, sample_every)
        rows = np.flatnonzero(logged)
        counts = Totals(sampled_out=n_kept - len(rows))
        if not len(rows):
            return counts
        whole = len(rows) == len(logged)
        kept = {}
        for name in BY_LAYER:
            if name in tensors:
                array = _host(tensors[name])
                if not whole:
                    array = array.take(rows, axis=1)
                elif block.staged.pinned:
                    array = array.copy()
                kept[name] = array
        if not self.tokens:
            _require_logits(kept["logits"])
        told: dict[str, NDArray[Any]] = {
            "sequence": block.sequence[rows],
            "position": tensors["position"].numpy()[rows].astype(np.uint32),
            "phase": block.phase[rows],
            "forward": block.forward[rows],
            "parent": np.full(len(rows), -1) if block.parent is None else block.parent[rows],
            "token_id": np.full(len(rows), _NO_TOKEN_ID, dtype=np.int32),
            "nll": np.full(len(rows), np.nan, dtype=np.float32),
        }
        if token_ids and "token_id" in tensors:
            told["token_id"] = tensors["token_id"].numpy()[rows].astype(np.int32)
        if "nll" in tensors:
            told["nll"] = tensors["nll"].numpy()[rows].astype(np.float32)
        for column in TEXT_COLUMNS:
            told[column] = self._codes(column, block.texts.get(column), rows)
        for name, array in told.items():
            self._identity.setdefault(name, []).append(array)
        self.layers = block.layers
        self._by_layer.append(kept)
        self.tokens += len(rows)
        return counts + Totals(
            rows=len(rows) * len(block.layers),
            tokens=len(rows),
            nonfinite=sum(map(_count_nonfinite, kept["logits"])),
        )

    def _codes(self, column: str, texts: Texts | None, rows: NDArray[np.intp]) -> NDArray[np.int32]:
        """Codes of these rows among all names that the buffer met; -1 for unknown."""
        if texts is None or not texts.names:
            return np.full(len(rows), -1, dtype=np.int32)
        if column not in tokens_schema(self.version).names:
            raise InvalidOption(
                f"the run is of schema version {self.version}, which has no column {column}: log "
                "into a new run"
            )
        names = self._names.setdefault(column, {})
        codes = [names.setdefault(name, len(names)) for name in texts.names]
        return np.array([*codes, -1], dtype=np.int32)[texts.code[rows]]

    def cut(self, tokens: int) -> None:
        """Forget the blocks behind the first so many tokens, where a block must end."""
        while self.tokens > tokens:
            self.tokens -= self._by_layer.pop()["logits"].shape[1]
            for parts in self._identity.values():
                parts.pop()

    def tokens_table(self, metadata: dict[str, str]) -> pa.Table:
        """Rows of the tokens shard; `metadata` goes into its footer."""
        columns = self._columns()
        nll, parent = columns["nll"], columns["parent"]
        schema = tokens_schema(self.version)
        arrays = {
            **self._identity_arrays(columns),
            "nll": pa.array(nll, mask=np.isnan(nll)),
            "parent": pa.array(parent.astype(np.uint32), mask=parent < 0),
        }
        for column in TEXT_COLUMNS:
            codes, names = columns[column], list(self._names.get(column, ()))
            arrays[column] = pa.DictionaryArray.from_arrays(
                pa.array(codes, mask=codes < 0), pa.array(names, pa.string())
            )
        return table(schema.with_metadata({**schema.metadata, **metadata}), arrays)

    def routing_tables(self) -> Iterator[pa.Table]:
        """Rows of the routing shard, a table per layer; each is valid until the next is asked for.

        They share memory: fresh memory for each costs more than what is done with it.
        """
        n_experts = self._by_layer[0]["logits"].shape[2]
        schema, T = routing_schema(n_experts, self.version), self.tokens
        own = self._identity_arrays(self._columns())
        wide = np.empty((T, n_experts), dtype=np.float32)
        for i in sorted(range(len(self.layers)), key=lambda i: self.layers[i]):
            parts = [{name: t[i] for name, t in block.items()} for block in self._by_layer]
            n_selected, experts, weights = zip(*map(_chosen, parts), strict=True)
            start = 0
            for part in parts:
                rows = slice(start, start + len(part["logits"]))
                _widen(part["logits"], wide[rows])
                start = rows.stop
            n, chosen, weight = map(np.concatenate, (n_selected, experts, weights))
            arrays = decided(schema, self.layers[i], n, chosen, weight, wide)
            if "n_rejected" in parts[0]:
                arrays["n_rejected"] = pa.array(
                    np.concatenate([part["n_rejected"] for part in parts]).astype(np.uint16)
                )
            yield table(schema, {**own, **arrays})

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {name: np.concatenate(parts) for name, parts in self._identity.items()}

    def _identity_arrays(self, columns: dict[str, NDArray[Any]]) -> dict[str, pa.Array]:
        """Columns that say who a row is, the same at every layer."""
        names = "token_id", "phase", "sequence", "position", "forward"
        return identity(self.rank, **{name: columns[name] for name in names})


def logged_rows(tensors: dict[str, Tensor], sample_every: int) -> tuple[NDArray[np.bool_], int]:
    """(R,) which rows of a block are logged, and how many are tokens at all."""
    keep: NDArray[np.bool_] = tensors["keep"].numpy()
    if sample_every == 1:
        return keep, int(keep.sum())
    return keep & (tensors["position"].numpy() % sample_every == 0), int(keep.sum())


def _chosen(
    part: dict[str, NDArray[Any]],
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float32]]:
    """n_selected of each row, and the experts and weights chosen, row after row."""
    T, K = part["experts"].shape
    experts = part["experts"].astype(np.uint16, copy=False)
    weights = np.empty((T, K), dtype=np.float32)
    _widen(part["weights"], weights)
    if "n_selected" not in part:
        return np.full(T, K, dtype=np.uint16), experts.ravel(), weights.ravel()
    n_selected = part["n_selected"].astype(np.uint16)
    chosen = np.arange(K) < n_selected[:, None]
    return n_selected, experts[chosen], weights[chosen]


# Plain numpy from here on: torch would spread over the cores that the model needs.


def _host(tensor: Tensor) -> NDArray[Any]:
    """A host tensor as an array; bfloat16, which numpy lacks, as its bits in uint16."""
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: NDArray[Any] = tensor.numpy()
    return array


def _widen(values: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Write floats, or bfloat16 as its bits, to float32; exact."""
    if values.dtype == np.uint16:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = values


def _require_logits(logits: NDArray[Any]) -> None:
    """Raise UnsupportedModel if (L, T, E) logits are probabilities, each row of which sums to 1."""
    L, T, E = logits.shape
    values = np.empty((L, min(T, _ENOUGH), E), dtype=np.float32)
    _widen(logits[:, :_ENOUGH], values)
    if values[..., 0].size < _FEWEST or not ((values >= 0) & (values <= 1)).all():
        return
    if (np.abs(values.sum(axis=-1) - 1) < _ROUNDING).all():
        raise UnsupportedModel(
            "the routers return probabilities in place of logits, which BH and its null model are "
            "about; register a family whose forward returns the logits"
        )


def _count_nonfinite(logits: NDArray[Any]) -> int:
    """Rows of (T, E) logits with a NaN or an infinity."""
    if logits.dtype == np.uint16:
        bad = (logits & 0x7F80) == 0x7F80  # bfloat16 with all bits of the exponent set
        return int(bad.any(axis=1).sum()) if bad.any() else 0
    finite = np.isfinite(logits)
    return 0 if finite.all() else int((~finite).any(axis=1).sum())
