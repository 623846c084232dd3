"""Drawing a run's figures: what each needs of the log, and the files they become."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis import figures
from analysis.log import Log, Progress, layer_of, logits_of
from analysis.profile import profile_log
from analysis.replay import p_values_of
from capture.bh import BhOptions, critical_values
from capture.errors import InvalidOption
from capture.kde import KdeModel

SAMPLE_ROWS = 4_000  # rows whose p-values figures show, over all layers
SWEEP_ALPHAS = tuple(i / 50 for i in range(1, 50))
STEP_UP_ROWS = 6

K = TypeVar("K")


@dataclass(eq=False)
class RunData:
    """What the figures of a run show.

    Attributes:
        log, kde: the run and its null model, if there is one.
        alpha: BH level that figures show; None for a native run without one.
        selected: (L, E + 1), rows by layer and n_selected.
        load: (L, E), share of a layer's tokens that use an expert.
        by_source: (L, E) of the same kind for each source.
        logits, p: (N, E), sampled rows; p is empty without p-values.
        layers: (N,), their layers.
        decisions: their n_rejected and n_selected at alpha, (N,) each.
    """

    log: Log
    kde: KdeModel | None
    alpha: float | None
    selected: NDArray[np.int64]
    load: NDArray[np.float64]
    by_source: dict[str, NDArray[np.float64]]
    logits: NDArray[np.float32]
    p: NDArray[np.float64]
    layers: NDArray[np.int64]

    @property
    def bounds(self) -> tuple[int, int] | tuple[None, None]:
        """min_k and max_k of a BH run; None under native routing."""
        options = self.log.manifest.routing.options
        return (None, None) if options is None else options.bounds(self.log.n_experts)

    def rejections(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Whether each sampled row's k-th p-value passes (N, E), and n_rejected (N,)."""
        assert self.alpha is not None
        E = self.p.shape[1]
        passes = np.sort(self.p, axis=1) <= critical_values(self.alpha, E)
        last = E - np.argmax(passes[:, ::-1], axis=1)
        return passes, np.where(passes.any(axis=1), last, 0)


@dataclass(frozen=True)
class FigureKind:
    """A figure of a run: what it shows, what it needs, and how it is drawn.

    Attributes:
        title: for listings.
        draw: draws RunData on a Figure.
        needs: "p-values", "alpha", "null model" or "sources", without which it is left out.
    """

    title: str
    draw: Callable[[RunData, Figure], object]
    needs: tuple[str, ...] = ()


def draw_figures(
    log: Log,
    names: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    kde: KdeModel | None = None,
    alpha: float | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw figures of a run as PNG files; return their paths.

    Args:
        names: keys of FIGURES; None draws all that the run can show.
        out: folder of the files; None is `figures` in the run's folder.
        kde: null model for p-values; None takes the run's own.
        alpha: BH level to show; None takes the run's own.

    Raises:
        InvalidOption: no such figure, or the run cannot show one that was named.
    """
    data = _gather(log, kde or log.kde, alpha, progress)
    chosen = []
    for name in names if names is not None else FIGURES:
        if name not in FIGURES:
            near = get_close_matches(name, FIGURES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"figures: {', '.join(FIGURES)}"
            raise InvalidOption(f"no figure '{name}'; {hint}")
        missing = [need for need in FIGURES[name].needs if not _has(data, need)]
        if missing and names is not None:
            raise InvalidOption(f"{log.path}: figure '{name}' needs {_MISSING[missing[0]]}")
        if not missing:
            chosen.append(name)
    folder = Path(out) if out is not None else Path(log.path) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return [_save(FIGURES[name], data, folder / f"{name}.png") for name in chosen]


def _save(kind: FigureKind, data: RunData, path: Path) -> Path:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    kind.draw(data, figure)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)
    return path


def _gather(
    log: Log, kde: KdeModel | None, alpha: float | None, progress: Progress | None
) -> RunData:
    options = log.manifest.routing.options
    if kde is not None:
        kde.require(log.layers, log.n_experts)
    empirical = kde is None and options is not None and options.p_values == "empirical"
    if alpha is not None:
        BhOptions(alpha)  # checks it
    rows = sum(group.rows for group in log.row_groups())
    total = log.fold(
        lambda: _Counts(
            log.n_experts, max(1, rows // SAMPLE_ROWS), kde, empirical, _sources_of(log)
        ),
        ("layer", "rank", "sequence", "forward", "logits", "experts", "n_selected"),
        progress=progress,
    )
    names = sorted({source for _, source in total.load if source})
    E, L = log.n_experts, log.layers
    empty = np.zeros(E + 1, dtype=np.int64)
    return RunData(
        log=log,
        kde=kde,
        alpha=alpha if alpha is not None or options is None else options.alpha,
        selected=np.stack([total.selected.get(layer, empty) for layer in L]),
        load=_shares(total, L, None, E),
        by_source={name: _shares(total, L, name, E) for name in names},
        logits=np.concatenate([*total.logits, np.zeros((0, E), np.float32)]),
        p=np.concatenate([*total.p, np.zeros((0, E))]),
        layers=np.concatenate([*total.layers, np.zeros(0, np.int64)]),
    )


def _sources_of(log: Log) -> dict[tuple[int, int], str]:
    """Source of each (rank, sequence)."""
    tokens = pl.DataFrame(pl.from_arrow(log.tokens(["rank", "sequence", "source"])))
    known = tokens.with_columns(pl.col("source").cast(pl.String)).drop_nulls().unique()
    return {(rank, sequence): source for rank, sequence, source in known.iter_rows()}


def _shares(
    total: "_Counts", layers: Sequence[int], source: str | None, n_experts: int
) -> NDArray[np.float64]:
    """(L, E) share of the tokens of a source (None: all) that use an expert."""
    result = np.zeros((len(layers), n_experts))
    for i, layer in enumerate(layers):
        keys = [key for key in total.load if key[0] == layer and source in (None, key[1])]
        rows = sum(total.rows[key] for key in keys)
        if rows:
            result[i] = sum(total.load[key] for key in keys) / rows
    return result


class _Counts:
    """Counts over all rows and a sample of them, gathered in one pass."""

    def __init__(
        self,
        n_experts: int,
        every: int,
        kde: KdeModel | None,
        empirical: bool,
        sources: dict[tuple[int, int], str],
    ) -> None:
        self._E, self._every, self._kde, self._empirical = n_experts, every, kde, empirical
        self._sources = sources
        self.selected: dict[int, NDArray[np.int64]] = {}
        self.load: dict[tuple[int, str], NDArray[np.int64]] = {}
        self.rows: dict[tuple[int, str], int] = {}
        self.logits: list[NDArray[np.float32]] = []
        self.p: list[NDArray[np.float64]] = []
        self.layers: list[NDArray[np.int64]] = []

    def update(self, batch: pa.RecordBatch) -> None:
        layer, E = layer_of(batch), self._E
        n = batch.column("n_selected").to_numpy()
        _add(self.selected, layer, np.bincount(n, minlength=E + 1))
        flat = batch.column("experts").flatten().to_numpy()
        rank, sequence = batch.column("rank").to_numpy(), batch.column("sequence").to_numpy()
        key, inverse = np.unique(
            rank.astype(np.int64) << 32 | sequence.astype(np.int64), return_inverse=True
        )
        names = np.array([self._sources.get((int(k) >> 32, int(k) & 0xFFFFFFFF), "") for k in key])
        for name in np.unique(names):
            mine = (names == name)[inverse]
            self.rows[layer, str(name)] = self.rows.get((layer, str(name)), 0) + int(mine.sum())
            load = np.bincount(flat[np.repeat(mine, n)], minlength=E)
            _add(self.load, (layer, str(name)), load)
        if self._kde is not None or self._empirical:
            null = None if self._kde is None else self._kde[layer]
            self.logits.append(logits_of(batch)[:: self._every].copy())
            self.p.append(p_values_of(batch, null)[:: self._every])
            self.layers.append(np.full(len(self.p[-1]), layer, dtype=np.int64))

    def merge(self, other: Self) -> None:
        for layer, counts in other.selected.items():
            _add(self.selected, layer, counts)
        for key, counts in other.load.items():
            _add(self.load, key, counts)
            self.rows[key] = self.rows.get(key, 0) + other.rows[key]
        self.logits += other.logits
        self.p += other.p
        self.layers += other.layers


def _add(table: dict[K, NDArray[np.int64]], key: K, counts: NDArray[np.int64]) -> None:
    table[key] = table[key] + counts if key in table else counts


def _has(data: RunData, need: str) -> bool:
    return {
        "p-values": len(data.p) > 0,
        "alpha": data.alpha is not None,
        "null model": data.kde is not None and data.kde.pooled,
        "sources": len(data.by_source) > 1,
    }[need]


_MISSING = {
    "p-values": "p-values: give the run a null model with --kde FILE",
    "alpha": "a BH level: give one with --alpha A",
    "null model": "a null model pooled over experts: give one with --kde FILE",
    "sources": "text of at least two sources",
}


def _draw_step_up(data: RunData, figure: Figure) -> None:
    """Rows that show few, middling and many rejections."""
    assert data.alpha is not None
    passes, n_rejected = data.rejections()
    low, high = data.bounds
    by_count = np.argsort(n_rejected, kind="stable")
    picks = by_count[(np.linspace(0.05, 0.98, STEP_UP_ROWS) * len(by_count)).astype(int)]
    figure.set_size_inches(9, 5.5)
    grid = figure.subplots(2, STEP_UP_ROWS // 2)
    for axes, row in zip(grid.flat, picks, strict=True):
        n = int(n_rejected[row])
        chosen = int(np.clip(n, low if low is not None else 1, high or passes.shape[1]))
        figures.plot_step_up(axes, data.p[row], data.alpha, n_rejected=n, n_selected=chosen)
        axes.set_title(f"layer {data.layers[row]}: {axes.get_title()}", fontsize=9)
    grid.flat[0].legend(fontsize=8)
    figure.suptitle(f"BH step-up at alpha {data.alpha:g} on {STEP_UP_ROWS} tokens")


def _draw_sweep(data: RunData, figure: Figure) -> None:
    low, high = data.bounds
    profile = profile_log(data.log, data.kde, alphas=SWEEP_ALPHAS)
    bounds = {"min_k": 1 if low is None else low, "max_k": high}
    frame = profile.frame(SWEEP_ALPHAS, min_k=bounds["min_k"] or 0, max_k=bounds["max_k"])
    by_layer = {layer: frame[f"layer_{layer}"].to_list() for layer in profile.counts}
    figures.plot_sweep(figure.subplots(), SWEEP_ALPHAS, by_layer, frame["overall"].to_list())


def _draw_sources(data: RunData, figure: Figure) -> None:
    first, second = list(data.by_source)[:2]
    difference = data.by_source[first] - data.by_source[second]
    figures.plot_source_difference(figure.subplots(), difference, data.log.layers, (first, second))


FIGURES: dict[str, FigureKind] = {
    "p_values": FigureKind(
        "p-values against the uniform distribution",
        lambda data, figure: figures.plot_p_value_histogram(figure.subplots(), data.p),
        ("p-values",),
    ),
    "step_up": FigureKind(
        "the BH step-up rule on sample tokens", _draw_step_up, ("p-values", "alpha")
    ),
    "expert_heatmap": FigureKind(
        "share of tokens that use an expert, layer by expert",
        lambda data, figure: figures.plot_expert_heatmap(
            figure.subplots(), data.load, data.log.layers
        ),
    ),
    "experts_histogram": FigureKind(
        "experts selected, with mean, min_k and max_k",
        lambda data, figure: figures.plot_experts_histogram(
            figure.subplots(),
            data.selected.sum(axis=0),
            min_k=data.bounds[0],
            max_k=data.bounds[1],
        ),
    ),
    "logits_p_values": FigureKind(
        "logits against p-values",
        lambda data, figure: figures.plot_logits_against_p_values(
            figure.subplots(), data.logits[::8], data.p[::8], data.layers[::8]
        ),
        ("p-values",),
    ),
    "passing_rate": FigureKind(
        "passing rate of the BH threshold by rank",
        lambda data, figure: figures.plot_passing_rate(
            figure.subplots(), data.rejections()[0].mean(axis=0), data.bounds[1]
        ),
        ("p-values", "alpha"),
    ),
    "mean_experts": FigureKind(
        "experts per token by layer",
        lambda data, figure: figures.plot_mean_experts(
            figure.subplots(), data.selected, data.log.layers
        ),
    ),
    "sweep": FigureKind("experts per token at every alpha", _draw_sweep, ("null model",)),
    "sources": FigureKind(
        "experts that serve one source more than another", _draw_sources, ("sources",)
    ),
}

SEED_FIGURES = tuple(FIGURES)[:6]
