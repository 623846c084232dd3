"""Drawing a run's figures: what each needs of the log, and the files they become."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bhlog.analysis.figures import figures
from bhlog.analysis.figures.file import save_figure
from bhlog.analysis.figures.load import ExpertLoad, expert_load, source_load
from bhlog.analysis.figures.sample import LayerSample, sample_rows
from bhlog.analysis.log import Log
from bhlog.analysis.replay.comparison import replay
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions, critical_values

# even in the logarithm where few experts pass, then in steps of 0.03
SWEEP_ALPHAS = (
    *np.geomspace(1e-4, 0.09, 25).round(6).tolist(),
    *(i / 100 for i in range(12, 100, 3)),
)
STEP_UP_QUANTILES = (0.1, 0.5, 0.9, 0.3, 0.7, 0.99)  # of n_rejected, for the sample tokens
MOST_POINTS = 40_000  # of the scatter of logits against p-values


class RunData:
    """What the figures of a run show, read from the log when a figure first asks for it.

    Args:
        log: the run.
        kde: null model for p-values; None takes the run's own, or its empirical p-values.
        alpha: BH level; None takes the run's own, or 0.05 for a native run.

    Raises:
        InvalidOption: alpha is out of range.
        KdeMismatch: the null model is for other layers or experts.
    """

    def __init__(self, log: Log, kde: KdeModel | None, alpha: float | None) -> None:
        if kde is not None:
            kde.require(log.layers, log.n_experts)
        own = log.manifest.routing.options or BhOptions()
        options = settings_of(log, [own.alpha if alpha is None else alpha])[0]
        self.log, self.kde = log, kde
        self.options = options if kde is None else replace(options, p_values="kde")

    @property
    def logged_bounds(self) -> tuple[int, int] | tuple[None, None]:
        """min_k and max_k of a BH run; None under native routing."""
        options = self.log.manifest.routing.options
        return (None, None) if options is None else options.bounds(self.log.n_experts)

    @cached_property
    def load(self) -> ExpertLoad:
        """Counts over all rows.

        Raises:
            InvalidOption: the run has no rows.
        """
        load = expert_load(self.log)
        if not load.rows.sum():
            raise InvalidOption(f"{self.log.path}: no rows to draw")
        return load

    @cached_property
    def samples(self) -> list[LayerSample]:
        """Rows of each layer with p-values.

        Raises:
            InvalidOption, KdeMismatch: the run has no rows, or they have no p-values.
        """
        samples = sample_rows(self.log, self.options, self.kde)
        if not samples:
            raise InvalidOption(f"{self.log.path}: no rows to draw")
        return samples


@dataclass(frozen=True)
class FigureKind:
    """A figure of a run.

    Attributes:
        shows: in words, for listings.
        needs: what a run must have, in words; "" if any run will do.
        draw: draws RunData on a Figure; raises InvalidOption or KdeMismatch where the run lacks
            what is needed.
    """

    shows: str
    needs: str
    draw: Callable[[RunData, Figure], object]


def draw_figures(
    log: Log,
    names: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    kde: KdeModel | None = None,
    alpha: float | None = None,
    left_out: Callable[[str, str], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Path]:
    """Draw figures of a run as PNG files; return their paths.

    Memory stays flat: p-values are those of a sample of rows, counts those of all rows.

    Args:
        names: keys of FIGURES; None draws all that the run can show.
        out: folder of the files; None is `figures` in the run's folder.
        kde: null model for p-values; None takes the run's own, or its empirical p-values.
        alpha: BH level to show; None takes the run's own, or 0.05 for a native run.
        left_out: called with the name of a figure that the run cannot show, and why.
        progress: called with 1 after each figure.

    Raises:
        InvalidOption, KdeMismatch: no such figure, an option is out of range, the folder cannot be
            written, or the run cannot show a figure that was named.
    """
    for name in names or ():
        if name not in FIGURES:
            near = get_close_matches(name, FIGURES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"figures: {', '.join(FIGURES)}"
            raise InvalidOption(f"no figure '{name}'; {hint}")
    data = RunData(log, kde, alpha)
    folder = _folder(log, out)
    paths = []
    for name in dict.fromkeys(FIGURES if names is None else names):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        try:
            FIGURES[name].draw(data, figure)
        except (InvalidOption, KdeMismatch) as error:
            if names is not None:
                raise
            if left_out is not None:
                left_out(name, str(error))
        else:
            paths.append(save_figure(figure, folder / f"{name}.png", dpi=150))
        if progress is not None:
            progress(1)
    return paths


def _folder(log: Log, out: str | Path | None) -> Path:
    if out is None and "://" in log.path:
        raise InvalidOption(f"{log.path} is not a local folder; say where figures go: --out DIR")
    folder = Path(log.path) / "figures" if out is None else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOption(f"{folder}: cannot make the folder ({error.strerror})") from error
    return folder


def _draw_p_values(data: RunData, figure: Figure) -> None:
    p = np.concatenate([sample.p.ravel() for sample in data.samples])
    figures.plot_p_value_histogram(figure.subplots(), p)


def _draw_step_up(data: RunData, figure: Figure) -> None:
    """Tokens with few, middling and many rejections, of layers from the first to the last."""
    n = len(STEP_UP_QUANTILES)
    layers = np.linspace(0, len(data.samples) - 1, n).round().astype(int)
    figure.set_size_inches(10.5, 6.5)
    grid = figure.subplots(2, n // 2)
    for axes, layer, quantile in zip(grid.flat, layers, STEP_UP_QUANTILES, strict=True):
        sample = data.samples[layer]
        order = np.argsort(sample.n_rejected, kind="stable")
        row = int(order[int(quantile * (len(order) - 1))])
        figures.plot_step_up(
            axes,
            sample.p[row],
            data.options.alpha,
            n_rejected=int(sample.n_rejected[row]),
            n_selected=int(sample.n_selected[row]),
        )
        where = f"layer {sample.layer}, sequence {sample.sequence[row]}, "
        axes.set_title(f"{where}position {sample.position[row]}\n{axes.get_title()}", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    alpha, low, high = data.options.alpha, *data.options.bounds(data.log.n_experts)
    figure.suptitle(f"BH step-up at alpha {alpha:g}, min_k {low}, max_k {high}: sample tokens")


def _draw_logits(data: RunData, figure: Figure) -> None:
    E = data.log.n_experts
    most = max(1, MOST_POINTS // (E * len(data.samples)))
    rows = [slice(None, None, -(-len(sample.p) // most)) for sample in data.samples]
    logits, p = (
        np.concatenate([getattr(s, name)[part] for s, part in zip(data.samples, rows, strict=True)])
        for name in ("logits", "p")
    )
    layers = [np.full(len(s.p[part]), s.layer) for s, part in zip(data.samples, rows, strict=True)]
    figures.plot_logits_against_p_values(figure.subplots(), logits, p, np.concatenate(layers))


def _draw_passing_rate(data: RunData, figure: Figure) -> None:
    E, alpha = data.log.n_experts, data.options.alpha
    sorted_p = np.concatenate([sample.sorted_p for sample in data.samples])
    n_rejected = np.concatenate([sample.n_rejected for sample in data.samples])
    rejected = np.bincount(n_rejected, minlength=E + 1)[::-1].cumsum()[::-1][1:] / len(n_rejected)
    low, high = data.options.bounds(E)
    figures.plot_passing_rate(
        figure.subplots(),
        (sorted_p <= critical_values(alpha, E)).mean(axis=0),
        rejected,
        alpha=alpha,
        min_k=low,
        max_k=high,
    )


def _draw_heatmap(data: RunData, figure: Figure) -> None:
    figure.set_size_inches(9, 4.5)
    figures.plot_expert_heatmap(figure.subplots(), data.load.share, data.log.layers)


def _draw_histogram(data: RunData, figure: Figure) -> None:
    low, high = data.logged_bounds
    counts = data.load.n_selected.sum(axis=0)
    figures.plot_experts_histogram(figure.subplots(), counts, min_k=low, max_k=high)


def _draw_mean_experts(data: RunData, figure: Figure) -> None:
    figures.plot_mean_experts(figure.subplots(), data.load.n_selected, data.log.layers)


def _draw_sweep(data: RunData, figure: Figure) -> None:
    if not data.load.rows.all():
        raise InvalidOption(f"{data.log.path}: no rows of some layers to replay")
    logged = data.log.manifest.routing.options
    figures.plot_sweep(
        figure.subplots(),
        SWEEP_ALPHAS,
        _swept(data),
        data.log.layers,
        alpha=None if logged is None else logged.alpha,
    )


def _swept(data: RunData) -> NDArray[np.float64]:
    """(L, A) replayed mean experts of each layer at SWEEP_ALPHAS, over all rows."""
    log, layers = data.log, data.log.layers
    low, high = data.options.bounds(log.n_experts)
    null = data.kde or log.kde
    if data.options.p_values == "kde" and null is not None and null.pooled:
        profile = profile_log(log, data.kde, alphas=SWEEP_ALPHAS)
        frame = profile.frame(SWEEP_ALPHAS, min_k=low, max_k=high)
        return np.stack([frame[f"layer_{layer}"].to_numpy() for layer in layers])
    settings = [replace(data.options, alpha=alpha) for alpha in SWEEP_ALPHAS]
    frame = replay(log, settings, kde=data.kde).drop_nulls("layer").sort("layer", "alpha")
    return frame["mean_experts"].to_numpy().reshape(len(layers), len(SWEEP_ALPHAS))


def _draw_sources(data: RunData, figure: Figure) -> None:
    load = source_load(data.log)
    if load is None:
        raise InvalidOption(f"{data.log.path}: its tokens come from fewer than two sources")
    figure.set_size_inches(9, 4.5)
    difference = load.share[0] - load.share[1]
    axes = figures.plot_source_difference(
        figure.subplots(), difference, data.log.layers, load.names
    )
    if load.n_sources > 2:
        note = f"the 2 sources with most tokens of {load.n_sources:,}"
        axes.set_title(f"{axes.get_title()}\n{note}", fontsize=9)


_P_VALUES = "a null model, or empirical p-values"

FIGURES: dict[str, FigureKind] = {
    "p_values": FigureKind("p-values against the uniform distribution", _P_VALUES, _draw_p_values),
    "step_up": FigureKind("the BH step-up rule on sample tokens", _P_VALUES, _draw_step_up),
    "expert_heatmap": FigureKind(
        "how often each expert was selected, layer by expert", "", _draw_heatmap
    ),
    "experts_histogram": FigureKind(
        "experts selected per row, with mean, min_k and max_k", "", _draw_histogram
    ),
    "logits_p_values": FigureKind("logits against p-values", _P_VALUES, _draw_logits),
    "passing_rate": FigureKind(
        "passing rate of the BH threshold by rank", _P_VALUES, _draw_passing_rate
    ),
    "mean_experts": FigureKind("experts per token by layer", "", _draw_mean_experts),
    "sweep": FigureKind("replayed experts per token against alpha", _P_VALUES, _draw_sweep),
    "sources": FigureKind(
        "experts that one source selects more than another", "two sources", _draw_sources
    ),
}

SEED_FIGURES = tuple(FIGURES)[:6]
