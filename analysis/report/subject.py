"""What a report is of: runs, the null models they are held against, what is read of them once."""

import shlex
from collections.abc import Sequence
from functools import cached_property

import polars as pl

from bhlog.analysis.figures.load import ExpertLoad, expert_load
from bhlog.analysis.fold import Progress, Scope
from bhlog.analysis.log import Log
from bhlog.analysis.null.calibration import check, check_frame
from bhlog.analysis.nulls import Named as NamedNull
from bhlog.analysis.nulls import load_null
from bhlog.analysis.report.packed import Named
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.capture.contract.errors import RouterLogError
from bhlog.capture.contract.null.model import KdeModel


class Subject:
    """Runs, and what panels ask of them; each answer is found once.

    Args:
        runs: at least one.
        kdes: null models for all of them; none takes each run's own.
        tokenizer: whose texts of tokens are shown; None knows them where every token is a byte.

    Attributes:
        failed: what could not be computed, and why, by what it is.
    """

    def __init__(
        self, runs: Sequence[Log], kdes: Sequence[NamedNull] = (), *, tokenizer: str | None = None
    ) -> None:
        self.runs, self.tokenizer = tuple(runs), tokenizer
        self.nulls = tuple((_name(named), load_null(named)) for named in kdes)
        self.failed: dict[str, str] = {}
        self._progress: Progress | None = None

    def count(self, progress: Progress) -> None:
        """Find the profiles now, calling `progress` with rows as they are read."""
        self._progress = progress
        self.profiles  # noqa: B018 - found once
        self._progress = None

    @property
    def run(self) -> Log:
        """The first run: panels of one run are of it."""
        return self.runs[0]

    @cached_property
    def profiles(self) -> list[Named]:
        """A profile of each run under each null model that serves it; see `failed` for the rest."""
        found = []
        for run in self.runs:
            for name, kde in self.nulls_of(run):
                several = len(self.nulls) > 1
                label = f"{run.name}, {name}" if several and name else run.name
                command = f"bhlog sweep {quoted(run.path)}" + (
                    f" --kde {quoted(name)}" if name else ""
                )
                try:
                    profile = profile_log(run, kde, kept=True, scope=Scope(progress=self._progress))
                except RouterLogError as error:
                    self.failed[f"the explorer of {label}"] = str(error)
                    continue
                top_k = run.manifest.model.top_k
                found.append(Named(label, profile, top_k, command, alpha_of(run)))
        return found

    def nulls_of(self, run: Log) -> Sequence[tuple[str, KdeModel | None]]:
        """Null models for a run, by how a command names them; "" is the run's own."""
        return self.nulls or [("", None)]

    @cached_property
    def null(self) -> tuple[str, KdeModel] | None:
        """The null model that panels of the first run hold it against; None without one."""
        if self.nulls:
            return self.nulls[0]
        return None if self.run.kde is None else ("", self.run.kde)

    @cached_property
    def checks(self) -> pl.DataFrame | None:
        """Calibration of the first run, a row a layer; None without a null model that serves."""
        if self.null is None or not self.run.has_logits:
            return None
        try:
            return check_frame(check(self.null[1], self.run))
        except RouterLogError as error:
            self.failed["calibration"] = str(error)
            return None

    @cached_property
    def loads(self) -> dict[str, ExpertLoad]:
        """Experts that rows were given, by the path of the run."""
        return {run.path: expert_load(run) for run in self.runs}

    def kde_words(self) -> str:
        """How commands on the first run name the null model."""
        return f" --kde {quoted(self.null[0])}" if self.null is not None and self.null[0] else ""


def alpha_of(run: Log) -> float | None:
    """The level of a run that BH routed; None of any other."""
    routing = run.manifest.routing
    return routing.options.tested_alpha if routing.kind == "bh" and routing.options else None


def quoted(text: str) -> str:
    """A path in a shell."""
    return shlex.quote(text)


def _name(named: NamedNull) -> str:
    if isinstance(named, KdeModel):
        return f"null-{named.sha256[:8]}.parquet"
    return named.path if isinstance(named, Log) else str(named)
