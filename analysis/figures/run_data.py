"""What the figures of a run are drawn from, read from the log when a figure first asks for it."""

from dataclasses import replace
from functools import cached_property
from pathlib import PurePath

from bhlog.analysis.figures.about import logged_words, null_words, run_words, setting_words
from bhlog.analysis.figures.load import ExpertLoad, expert_load
from bhlog.analysis.figures.sample import LayerSample, sample_rows
from bhlog.analysis.log import Log
from bhlog.analysis.nulls import Named, load_null
from bhlog.analysis.replay.settings import settings_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import OPEN, BhOptions, Bounds


class RunData:
    """A run, and the settings that its p-values are held against.

    Args:
        log: the run.
        kde: null model for p-values, see bhlog.analysis.nulls.load_null; None takes the run's own,
            or its empirical p-values.
        alpha: BH level; None takes the run's own, or 0.05 for a native run.
        bounds: on experts; what is open is as in the run.

    Attributes:
        options: the settings that come of these.
        alpha: the level asked for, or else the run's own; None where there is neither.
        bounds: (min_k, max_k) as numbers.
        replayed: whether these are other settings than the run was routed by.

    Raises:
        InvalidOption: a setting is out of range.
        KdeMismatch: the null model is for other layers or experts.
    """

    def __init__(
        self,
        log: Log,
        kde: Named | None = None,
        alpha: float | None = None,
        bounds: Bounds = OPEN,
    ) -> None:
        self.log = log
        self.kde = None if kde is None else load_null(kde)
        self._kde_name = _name_of(kde)
        if self.kde is not None:
            self.kde.require(log.layers, log.n_experts)
        logged = log.manifest.routing.options
        own = logged or BhOptions()
        level = own.alpha if alpha is None else alpha
        logged = None if own.policy is not None else logged
        options = settings_of(log, [level], bounds=bounds)[0]
        self.options = options if self.kde is None else replace(options, p_values="kde")
        self.alpha = level if alpha is not None or logged is not None else None
        self.bounds = self.options.bounds(log.n_experts)
        self.replayed = logged != self.options or self.kde is not None

    @property
    def top_k(self) -> int:
        """Experts per token under the model's own routing."""
        return self.log.manifest.model.top_k

    @property
    def most_k(self) -> int | None:
        """max_k where it binds: None where it is all experts."""
        return self.bounds[1] if self.bounds[1] < self.log.n_experts else None

    @property
    def logged_bounds(self) -> tuple[int | None, int | None]:
        """min_k and max_k of a BH run, None where it has none or lets all experts in."""
        options = self.log.manifest.routing.options
        if options is None:
            return None, None
        low, high = options.bounds(self.log.n_experts)
        return low, high if high < self.log.n_experts else None

    @property
    def logged_about(self) -> tuple[str, ...]:
        """What figures of the logged decisions are of."""
        return logged_words(self.log)

    @property
    def source(self) -> tuple[str, ...]:
        """The run, its model, and where p-values come from."""
        if self.options.p_values == "empirical":
            null = "empirical p-values"
        else:
            null = null_words(self.kde or self.log.kde, self._kde_name)
        return *run_words(self.log), null

    @property
    def about(self) -> tuple[str, ...]:
        """What figures of p-values are of."""
        return *self.source, *setting_words(self.options, self.log.n_experts)

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


def _name_of(kde: Named | None) -> str:
    """How titles call a null model."""
    if kde is None:
        return "the run's own"
    if isinstance(kde, KdeModel):
        return f"model {kde.sha256[:8]}"
    return kde.name if isinstance(kde, Log) else PurePath(kde).name
