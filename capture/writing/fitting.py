"""A null model of what a run logs, counted while it is written and ready when it is closed."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import require_local, whole_file
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.histogram import Histogram, HistogramKey
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.trim import Trim
from bhlog.capture.contract.store import Store
from bhlog.capture.contract.uris import shown
from bhlog.capture.writing.counting import count_shard
from bhlog.capture.writing.writer import RunWriter


@dataclass(frozen=True)
class KdeFit:
    """A null model to fit from a run as it is captured; the file is the one `bhlog kde fit` makes.

    Every logged row counts, those of a resumed run's earlier shards too, and nothing that was
    sampled out or dropped. With several ranks the last one to finish merges what all counted.

    Attributes:
        out: file to write once the run is closed, or the URI of an object; not in the run's
            folder, whose kde.parquet is the null model in force.
        kernel, bandwidth, trim_low, trim_high, null, null_from, centre: see FitOptions.
    """

    out: str | Path
    kernel: str = "gaussian"
    bandwidth: str | float = "scott"
    trim_low: int = 0
    trim_high: int = 0
    null: Literal["pooled", "expert"] = "pooled"
    null_from: Literal["kept", "central"] = "kept"
    centre: Literal["none", "median"] = "none"

    @property
    def options(self) -> FitOptions:
        """As fits take them.

        Raises:
            InvalidOption: one is out of range.
        """
        mine = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "out"}
        return FitOptions(**mine)

    def check(self, run: str | Path, n_experts: int, ranks: int) -> None:
        """Raise InvalidOption if the fit could not be made or written, before the model runs.

        Args:
            run: folder or URI of the run.
            n_experts: experts of its routers.
            ranks: how many write the run.
        """
        self.options.trim.check(n_experts)
        if "://" in str(self.out):
            store = Store(str(self.out))
            if ranks > 1:
                raise InvalidOption(
                    f"{store.name}: {ranks} ranks count into files beside the null model's, which "
                    "need a folder that they share; name one, or fit afterwards: bhlog kde fit"
                )
            return store.check()
        require_local(Path(self.out))
        out = Path(self.out).absolute()
        if out.is_dir():
            raise InvalidOption(f"{self.out}: is a folder; expected the name of a file")
        if out.is_relative_to(Path(run).absolute()):
            raise InvalidOption(
                f"{self.out}: inside the run, where only the null model in force belongs; name a "
                "file beside it"
            )
        if not out.parent.is_dir():
            raise InvalidOption(f"{self.out}: its folder does not exist; make it first")
        if not os.access(out.parent, os.W_OK):
            raise InvalidOption(f"{self.out}: its folder cannot be written to; choose another")

    def begin(self, writer: RunWriter) -> None:
        """Let a writer that has written nothing yet count what it seals, and count what is sealed.

        Raises:
            CorruptShard: a shard of the run that is resumed cannot be read.
        """
        self._part(writer.rank).unlink(missing_ok=True)
        counts = self.options.accumulator()
        for shard in writer.manifest.shards:
            count_shard(writer.place, f"routing/{shard.name}", counts)
        writer.sealer.histograms = counts

    def finish(self, writer: RunWriter) -> KdeModel | None:
        """Fit from what a closed writer counted, and save the model.

        Returns:
            The model; None where other ranks have yet to finish.

        Raises:
            InvalidOption: there is no row to fit from, or the file cannot be written.
        """
        assert writer.sealer.histograms is not None
        histograms = writer.sealer.histograms.histograms()
        ranks, run_id = writer.manifest.ranks, writer.manifest.run_id
        if ranks > 1:
            _save_part(self._part(writer.rank), histograms, run_id)
            merged = self._merge_parts(ranks, run_id)
            if merged is None:
                return None
            histograms = merged
        if not histograms:
            raise InvalidOption(
                f"{shown(str(self.out))}: no row was logged, so there is no null model to fit"
            )
        n_experts = writer.manifest.model.n_experts
        model = KdeModel.fit(histograms, self.options, source=[run_id], n_experts=n_experts)
        model.save(self.out)
        for rank in range(ranks):
            self._part(rank).unlink(missing_ok=True)
        return model

    def _part(self, rank: int) -> Path:
        """What a rank counted, until all of them are merged."""
        out = Path(self.out)
        return out.with_name(f"{out.name}.rank{rank:05d}.npz")

    def _merge_parts(self, ranks: int, run_id: str) -> dict[HistogramKey, Histogram] | None:
        """What all ranks counted together; None if one is missing.

        Two ranks that finish at once both merge, and write the same file.
        """
        total = self.options.accumulator()
        for rank in range(ranks):
            part = _load_part(self._part(rank), run_id)
            if part is None:
                return None
            total.add(part)
        return total.histograms()


def _save_part(path: Path, histograms: dict[HistogramKey, Histogram], run_id: str) -> None:
    """Write histograms as plain arrays, whole or not at all."""
    arrays: dict[str, Any] = {"run_id": np.array(run_id)}
    for i, (key, histogram) in enumerate(histograms.items()):
        expert = -1 if key.expert is None else key.expert
        head = [key.layer, expert, *key.trim, histogram.first, histogram.left_out]
        arrays[f"head{i}"] = np.array(head, dtype=np.int64)
        arrays[f"counts{i}"], arrays[f"spread{i}"] = histogram.counts, histogram.spread
    try:
        with whole_file(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise InvalidOption(f"{path}: cannot be written ({error.strerror})") from error


def _load_part(path: Path, run_id: str) -> dict[HistogramKey, Histogram] | None:
    """What _save_part wrote of this run; None if it is not there."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["run_id"]) != run_id:
                return None
            found = {}
            for i in range(len(arrays.files) // 3):
                layer, expert, low, high, first, left_out = arrays[f"head{i}"].tolist()
                key = HistogramKey(layer, None if expert < 0 else expert, Trim(low, high))
                found[key] = Histogram(first, arrays[f"counts{i}"], arrays[f"spread{i}"], left_out)
            return found
    except FileNotFoundError:
        return None
