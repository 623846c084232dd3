"""BHRoutingLogger: the run of a notebook experiment, with its JSON summaries and figures."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from bhlog.capture.contract.errors import InvalidOption, RouterLogError, RunExists
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.manifest import MANIFEST_NAME, Manifest, ModelInfo, Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.observe import new_writer
from bhlog.capture.recorder import Recorder
from bhlog.capture.routers.routing import Choice
from bhlog.capture.writing.stage import Staged
from bhlog.capture.writing.writer import Block, RunWriter, WriterOptions, remove_run

MOST_JSON_DECISIONS = 10_000  # the JSON log is for reading; the run holds every decision


class BHRoutingLogger:
    """Keeps what a patched model, or benjamini_hochberg_routing, decided; one of them at a time.

    Files: `OUTPUT_DIR/logs/NAME/` is the run as Parquet, complete at `save_logs()` and at
    `unpatch()`; `save_logs()` adds `NAME_bh_log.json` and `NAME_summary.json` beside it, and
    `generate_plots()` six figures in `OUTPUT_DIR/plots/NAME/`. An experiment of the same name that
    a logger wrote earlier is replaced when the logger is first used.

    Args:
        output_dir: where everything goes.
        experiment_name: names the files.
        log_every_n: log the tokens at every n-th position, at every layer. With empirical p-values,
            which depend on the whole batch, the run keeps every token and only the JSON log
            samples.
    """

    def __init__(
        self, output_dir: str | Path, experiment_name: str = "experiment", log_every_n: int = 1
    ) -> None:
        if log_every_n < 1:
            raise InvalidOption(f"log_every_n must be at least 1, got {log_every_n}")
        if not experiment_name or Path(experiment_name).name != experiment_name:
            raise InvalidOption(f"experiment_name must be a plain name, got {experiment_name!r}")
        self.output_dir = Path(output_dir)
        self.experiment_name = experiment_name
        self.log_every_n = log_every_n
        self._writer: RunWriter | None = None
        self._setting: tuple[ModelInfo, Routing, KdeModel | None] | None = None
        self._recorder: Recorder | None = None
        self._loose = _LooseRows()

    @property
    def run_dir(self) -> Path:
        """The run's folder, which every analysis command opens."""
        return self.output_dir / "logs" / self.experiment_name

    @property
    def plots_dir(self) -> Path:
        """Where the figures go."""
        return self.output_dir / "plots" / self.experiment_name

    def open(self, info: ModelInfo, routing: Routing, kde: KdeModel | None) -> RunWriter:
        """Start the run afresh; what an earlier logger of this name wrote is removed.

        Raises:
            RunExists: the folder holds something else.
            InvalidOption: the logger holds decisions of benjamini_hochberg_routing.
        """
        if self._loose.rows:
            raise InvalidOption(
                f"{self.run_dir}: this logger holds decisions of benjamini_hochberg_routing, which "
                "a patched model would replace; clear() it, or give the model a logger of its own"
            )
        return self._begin(info, routing, kde)

    def _begin(self, info: ModelInfo, routing: Routing, kde: KdeModel | None) -> RunWriter:
        if self._writer is not None:
            self._writer.close()
        _remove_experiment(self.run_dir)
        empirical = routing.options is not None and routing.options.p_values == "empirical"
        self._setting = (info, routing, kde)
        self._writer = new_writer(
            self.run_dir,
            info,
            routing,
            kde=kde,
            options=WriterOptions(sample_every=1 if empirical else self.log_every_n),
            extra={"experiment_name": self.experiment_name},
        )
        return self._writer

    def follow(self, recorder: Recorder) -> None:
        """Name the recorder that still holds rows on the device."""
        self._recorder = recorder

    def log_decisions(
        self,
        logits: Tensor,
        choice: Choice,
        *,
        routing: Routing,
        kde: KdeModel | None,
        layer: int,
        sequence: int,
        position: int,
        every: int,
    ) -> None:
        """Keep what benjamini_hochberg_routing decided for T tokens of a sequence.

        Args:
            logits: (T, E); choice: of the same rows.
            sequence: sample_idx; position: token_idx of the first row.
            every: keep the positions that are a multiple of it.

        Raises:
            InvalidOption: the logger holds the run of a patched model.
        """
        if self._writer is not None and not self._loose.rows:
            raise InvalidOption(
                f"{self.run_dir}: this logger holds the run of a patched model, which decisions of "
                "benjamini_hochberg_routing would replace; unpatch() the model and clear() the "
                "logger, or give the function a logger of its own"
            )
        self._loose.add(logits, choice, layer, sequence, position, every)
        self._loose.setting = (routing, kde)

    def save_logs(self) -> Path:
        """Seal the run so far and write both JSON files; return the path of the log file.

        Raises:
            RouterLogError: nothing was logged.
        """
        log = self._sealed()
        folder = self.run_dir.parent
        manifest: Manifest = log.manifest
        path = folder / f"{self.experiment_name}_bh_log.json"
        decisions = list(islice(self._decisions(log), MOST_JSON_DECISIONS))
        config = {
            "experiment_name": self.experiment_name,
            "log_every_n": self.log_every_n,
            "model": vars(manifest.model),
            "routing": manifest.routing.kind,
            **(manifest.routing.options.to_json() if manifest.routing.options else {}),
        }
        _write_json(
            path,
            {
                "config": config,
                "run": str(self.run_dir),
                "total_decisions": manifest.totals.rows,
                "decisions": decisions,
            },
        )
        _write_json(folder / f"{self.experiment_name}_summary.json", self.get_summary())
        return path

    def generate_plots(self) -> list[Path]:
        """Draw the six figures of the run into `plots_dir`; return their paths."""
        from bhlog.analysis.figures.drawing import SEED_FIGURES, draw_figures

        return draw_figures(self._sealed(), SEED_FIGURES, self.plots_dir)

    def get_summary(self) -> dict[str, Any]:
        """Counts over everything logged so far.

        Returns:
            total_decisions (rows); mean, std, min and max of experts_selected; the share of
            decisions at max_k (ceiling_hit_rate) and at min_k (floor_hit_rate); p_values: mean,
            std, min, max and the shares below 0.01, 0.05 and 0.1.
        """
        if self._writer is None and not self._loose.rows:
            return {"total_decisions": 0}
        log = self._sealed()
        options = log.manifest.routing.options
        E = log.n_experts
        low, high = options.bounds(E) if options else (0, E)
        counts = np.zeros(E + 1, dtype=np.int64)
        p_values = _Moments()
        columns = ["layer", "logits", "n_selected", "forward", "rank"]
        for batch in log.batches(columns):
            counts += np.bincount(batch.column("n_selected").to_numpy(), minlength=E + 1)
            p = _p_values(batch, log.kde, options is not None)
            if p is not None:
                p_values.add(p)
        total = int(counts.sum())
        if total == 0:
            return {"total_decisions": 0}
        k = np.arange(E + 1)
        mean = float(counts @ k / total)
        return {
            "total_decisions": total,
            "total_tokens": log.manifest.totals.tokens,
            "experts_selected": {
                "mean": mean,
                "std": float(np.sqrt(counts @ (k - mean) ** 2 / total)),
                "min": int(k[counts > 0].min()),
                "max": int(k[counts > 0].max()),
            },
            "ceiling_hit_rate": float(counts[high] / total),
            "floor_hit_rate": float(counts[low] / total),
            "p_values": p_values.summary(),
        }

    def clear(self) -> None:
        """Forget everything logged so far; logging goes on."""
        self._loose = _LooseRows()
        if self._recorder is not None and self._setting is not None:
            self._recorder.flush()
            self._recorder.writer = self._begin(*self._setting)
        elif self._writer is not None:
            self._writer.close()
            self._writer = None
            _remove_experiment(self.run_dir)

    def close(self) -> None:
        """Complete the run; its files stay readable through this logger."""
        self._recorder = None
        if self._writer is not None:
            self._writer.close()

    def _sealed(self) -> Any:
        """The run as a log, with everything so far sealed."""
        from bhlog.analysis.log import open_log

        if self._loose.rows:
            self._write_loose()
        if self._writer is None:
            raise RouterLogError(
                f"{self.run_dir}: nothing was logged; pass this logger to patch_with_bh and run "
                "the model first"
            )
        if self._recorder is not None:
            self._recorder.flush()
        if not self._writer.closed:
            self._writer.flush()
        return open_log(self.run_dir)

    def _write_loose(self) -> None:
        routing, kde = self._loose.setting
        layers = tuple(sorted(self._loose.rows))
        block, n_experts = self._loose.block(layers)
        info = ModelInfo(
            name="benjamini_hochberg_routing",
            class_name="",
            revision=None,
            layers=layers,
            n_experts=n_experts,
            top_k=n_experts,
            norm_topk_prob=True,
        )
        if kde is not None and not set(layers) <= set(kde):
            kde = None
        writer = self._begin(info, routing, kde)
        writer.submit(block)
        writer.close()

    def _decisions(self, log: Any) -> Iterator[dict[str, Any]]:
        """Decisions as the JSON log keeps them, in order of token, then layer."""
        columns = ["sequence", "position", "layer", "token_id", "phase", "experts", "weights",
                   "n_selected", "n_rejected", "logits", "forward", "rank"]  # fmt: skip
        rows: list[dict[str, Any]] = []
        for batch, p in _first_tokens(log, columns, self.log_every_n, MOST_JSON_DECISIONS):
            for i, row in enumerate(batch.to_pylist()):
                rows.append(
                    {
                        "sample_idx": row["sequence"],
                        "token_idx": row["position"],
                        "layer_idx": row["layer"],
                        "token_id": row["token_id"],
                        "num_selected": row["n_selected"],
                        "num_rejected": row["n_rejected"],
                        "selected_experts": row["experts"],
                        "weights": row["weights"],
                        "logits": row["logits"],
                        "p_values": None if p is None else p[i].tolist(),
                    }
                )
        rows.sort(key=lambda r: (r["sample_idx"], r["token_idx"], r["layer_idx"]))
        yield from rows


class _LooseRows:
    """Decisions that came from function calls, one layer at a time."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[tuple[int, int], tuple[Tensor, ...]]] = {}
        self.setting: tuple[Routing, KdeModel | None] = (Routing(), None)

    def add(
        self, logits: Tensor, choice: Choice, layer: int, sequence: int, position: int, every: int
    ) -> None:
        mine = self.rows.setdefault(layer, {})
        for t in range(len(logits)):
            if (position + t) % every == 0:
                mine[sequence, position + t] = (
                    logits[t].detach().float().cpu(),
                    choice.experts[t].cpu(),
                    choice.weights[t].float().cpu(),
                    choice.n_selected[t].cpu(),
                    choice.n_rejected[t].cpu(),
                )

    def block(self, layers: tuple[int, ...]) -> tuple[Block, int]:
        """The tokens that every layer has, as a block for the writer, and E."""
        tokens = sorted(set.intersection(*(set(rows) for rows in self.rows.values())))
        if not tokens:
            raise RouterLogError("no token was logged at every layer: nothing to save")
        names = ("logits", "experts", "weights", "n_selected", "n_rejected")
        tensors = {
            name: torch.stack(
                [torch.stack([self.rows[layer][t][i] for t in tokens]) for layer in layers]
            )
            for i, name in enumerate(names)
        }
        T = len(tokens)
        tensors["position"] = torch.tensor([position for _, position in tokens])
        tensors["keep"] = torch.ones(T, dtype=torch.bool)
        sequence = np.array([sequence for sequence, _ in tokens], dtype=np.uint32)
        block = Block(
            staged=Staged(tensors, n_bytes=0),
            layers=layers,
            sequence=sequence,
            forward=sequence,
            phase=np.zeros(T, dtype=np.int8),
        )
        return block, tensors["logits"].shape[-1]


class _Moments:
    """Mean, spread and extremes of p-values seen in pieces."""

    def __init__(self) -> None:
        self.n, self.total, self.squares = 0, 0.0, 0.0
        self.low, self.high = np.inf, -np.inf
        self.below = {0.01: 0, 0.05: 0, 0.1: 0}

    def add(self, p: NDArray[np.float64]) -> None:
        p = p[np.isfinite(p)]
        if not len(p):
            return
        self.n += len(p)
        self.total += float(p.sum())
        self.squares += float((p**2).sum())
        self.low, self.high = min(self.low, float(p.min())), max(self.high, float(p.max()))
        for bound in self.below:
            self.below[bound] += int((p < bound).sum())

    def summary(self) -> dict[str, float] | None:
        if not self.n:
            return None
        mean = self.total / self.n
        return {
            "mean": mean,
            "std": float(np.sqrt(max(0.0, self.squares / self.n - mean**2))),
            "min": self.low,
            "max": self.high,
            **{f"share_below_{bound}": n / self.n for bound, n in self.below.items()},
        }


def _p_values(batch: Any, kde: KdeModel | None, bh: bool) -> NDArray[np.float64] | None:
    """(T, E) float64 p-values of a batch of one layer; None for a run that has none."""
    from bhlog.analysis.log import layer_of
    from bhlog.analysis.replay.decide import p_values_of

    if kde is None and not bh:
        return None
    return p_values_of(batch, None if kde is None else kde[layer_of(batch)])


def _first_tokens(
    log: Any, columns: list[str], every: int, most_rows: int
) -> Iterator[tuple[Any, NDArray[np.float64] | None]]:
    """The first tokens at every `every`-th position: most_rows rows over all layers, or a few more.

    Returns:
        Batches of one layer, each with its (T, E) p-values, ranked within whole forwards.
    """
    from bhlog.analysis.log import layer_of

    missing = dict.fromkeys(log.layers, -(-most_rows // len(log.layers)))
    bh = log.manifest.routing.options is not None
    for batch in log.batches(columns):
        layer = layer_of(batch) if batch.num_rows else log.layers[0]
        kept = np.flatnonzero(batch.column("position").to_numpy() % every == 0)[: missing[layer]]
        if len(kept):
            p = _p_values(batch, log.kde, bh)
            yield batch.take(pa.array(kept)), None if p is None else p[kept]
            missing[layer] -= len(kept)
        if not any(missing.values()):
            return


def _remove_experiment(folder: Path) -> None:
    """Remove an earlier run of a logger; anything else is refused."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / MANIFEST_NAME
    if not path.exists() or "experiment_name" not in (
        Manifest.from_json(path.read_bytes(), str(path)).options
    ):
        raise RunExists(f"{folder}: holds files that no logger wrote; choose another name")
    remove_run(folder)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(data, indent=1).encode() + b"\n")
