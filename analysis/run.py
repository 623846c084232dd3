"""Run: a log with the verbs, each of which asks it something without a model and without a GPU."""

import atexit
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import polars as pl

from bhlog.analysis.cells import cell
from bhlog.analysis.fold import Progress, Scope
from bhlog.analysis.imports import needed
from bhlog.analysis.log import Log
from bhlog.analysis.nulls import Named, null_model, null_named
from bhlog.analysis.replay.settings import Alpha, settings_of
from bhlog.analysis.report.markup import small_table
from bhlog.analysis.verify.facts import facts_of
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import Bounds, Renormalize

# Lazy, below: numba, scipy, duckdb and matplotlib take long to import, and few verbs need them all.
if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

    from bhlog.analysis.cache.hits import ExpertBytes
    from bhlog.analysis.database.connection import Database
    from bhlog.analysis.figures.drawing import Image
    from bhlog.analysis.replay.policy import Policy
    from bhlog.analysis.report.embedded import Explorer
    from bhlog.analysis.sweep.profile import Profile


class Rows(TypedDict, total=False):
    """Which rows of the log a verb reads, and how; see Scope, which has the same attributes."""

    layers: Iterable[int] | None
    where: str | None
    sample: float
    threads: int | None
    progress: Progress | None
    executor: Executor | None


class Run(Log):
    """A run, open for questions.

    Where a verb takes a null model it takes what bhlog.analysis.nulls.load_null does: a KdeModel, a
    file, a run that has one, a folder of old pickles; None means the run's own. Where it takes a
    run it takes a path too. `**rows` says which rows it reads: layers, where (a condition in SQL),
    sample, threads, progress and an executor that does the work, as in Scope.

    Attributes:
        tokenizer: whose texts of tokens are shown: a folder, a hub name or "bytes"; None knows them
            where every token is a byte.
    """

    def __init__(self, path: str | Path, *, tokenizer: str | None = None) -> None:
        super().__init__(path)
        self.tokenizer = tokenizer

    def replay(
        self,
        alpha: Alpha | Sequence[Alpha],
        *,
        kde: Named | None = None,
        min_k: int | None = None,
        max_k: int | None = None,
        temperature: float | None = None,
        renormalize: Renormalize | None = None,
        out: str | Path | None = None,
        **rows: Unpack[Rows],
    ) -> pl.DataFrame:
        """Summary of the decisions at other settings, for each alpha and layer and overall.

        Args:
            alpha: BH level or a mapping with one for each layer, as Profile.alphas_for gives it;
                or several.
            kde: null model, see the class.
            min_k, max_k, temperature, renormalize: as BhOptions has them; None is as in the run.
            out: folder or URI that every decision is written to as well; see
                analysis.replay.decisions.

        Returns:
            Columns as in bhlog.analysis.replay.summary; the rows over all layers have layer null.
        """
        from bhlog.analysis.replay.comparison import replay
        from bhlog.analysis.replay.decisions import write_decisions

        scope, null = Scope(**rows), null_named(kde)
        settings = settings_of(
            self,
            [alpha] if isinstance(alpha, int | float | Mapping | Bh) else alpha,
            bounds=Bounds(min_k, max_k),
            temperature=temperature,
            renormalize=renormalize,
        )
        if out is not None:
            write_decisions(self, settings, out, kde=null, scope=scope)
        return replay(self, settings, kde=null, scope=scope)

    def sweep(
        self,
        kde: Named | None = None,
        *,
        alphas: Sequence[float] | None = None,
        kept: bool = False,
        **rows: Unpack[Rows],
    ) -> "Profile":
        """Experts at every alpha of a grid, from one pass; see bhlog.analysis.sweep.profile.

        Args:
            alphas: the grid; None is fine enough for most.
            kept: whether to count the probability that experts keep too, at about twice the cost.
        """
        from bhlog.analysis.sweep.profiling import profile_log

        return profile_log(self, null_named(kde), alphas=alphas, kept=kept, scope=Scope(**rows))

    def compare(
        self,
        policies: "Sequence[Policy | str]",
        *,
        kde: Named | None = None,
        experts: float | None = None,
        min_k: int | None = None,
        max_k: int | None = None,
        **rows: Unpack[Rows],
    ) -> pl.DataFrame:
        """What several policies would have chosen, and at what cost, from one pass.

        Args:
            policies: Policy, or texts such as "bh:0.3" and "topk:4,max_k=16".
            experts: mean experts per token that every policy is brought to first, by its value;
                texts may then leave it out: "bh".
            min_k, max_k: bounds of policies that have none of their own; None is as in the run.

        Returns:
            A row for each policy and layer, and for each policy over all layers (layer null).
        """
        from bhlog.analysis.replay.comparison import compare

        return compare(
            self,
            policies,
            kde=null_named(kde),
            experts=experts,
            bounds=Bounds(min_k, max_k),
            scope=Scope(**rows),
        )

    def cache(
        self,
        budget: int | str | Iterable[int | str],
        *,
        policies: "Sequence[Policy | str]" = (),
        kde: Named | None = None,
        expert_bytes: "ExpertBytes | None" = None,
        min_k: int | None = None,
        max_k: int | None = None,
        **rows: Unpack[Rows],
    ) -> pl.DataFrame:
        """Hit rates of caches of experts, over the log in the order that its layers ran.

        Args:
            budget: experts of each layer, or a size over all layers, "4000MiB"; or several.
            policies: what decides; none takes the experts that the run used.
            expert_bytes: of an expert, or by layer, for sizes.
            min_k, max_k: as of compare.

        Returns:
            A row for each policy, budget and cache; see bhlog.analysis.cache.hits.
        """
        from bhlog.analysis.cache.hits import replay_caches

        return replay_caches(
            self,
            [budget] if isinstance(budget, int | str) else budget,
            policies=policies,
            kde=null_named(kde),
            expert_bytes=expert_bytes,
            bounds=Bounds(min_k, max_k),
            scope=Scope(**rows),
        )

    def fidelity(
        self,
        rerun: Log | str | Path,
        *,
        progress: Progress | None = None,
        executor: Executor | None = None,
    ) -> pl.DataFrame:
        """How far a what-if can be trusted: this native run, replayed at the settings of a BH run.

        Args:
            rerun: the BH run of the same text.

        Returns:
            A row for each layer; columns as in bhlog.analysis.replay.fidelity.
        """
        from bhlog.analysis.replay.fidelity import fidelity

        scope = Scope(progress=progress, executor=executor)
        return fidelity(self, _log(rerun), scope=scope)

    def fit(
        self,
        options: FitOptions | None = None,
        *,
        also: Sequence[Log | str | Path] = (),
        **rows: Unpack[Rows],
    ) -> KdeModel:
        """Fit a null model from the logits of this run.

        Args:
            options: kernel, bandwidth, trimming; see FitOptions.
            also: further runs of the same model, whose logits count too.
        """
        from bhlog.analysis.null.estimate import fit_kde

        logs = [self, *(_log(run) for run in also)]
        return fit_kde(logs, options, scope=Scope(**rows))

    def check(
        self,
        kde: Named | None = None,
        *,
        by_expert: bool = False,
        ranks: Sequence[int] = (1, 2, 4, 8),
        **rows: Unpack[Rows],
    ) -> pl.DataFrame:
        """Are p-values uniform under a null model, where they should be?

        Args:
            by_expert: a row for each layer and expert, not for each layer.
            ranks: k of the k-th smallest p-values to hold against uniform order statistics.

        Returns:
            Columns as in bhlog.analysis.null.calibration.
        """
        from bhlog.analysis.null.calibration import check, check_frame, expert_frame

        checks = check(null_model(self, kde), self, ranks=ranks, scope=Scope(**rows))
        return expert_frame(checks) if by_expert else check_frame(checks)

    def sql(self, query: str, /, **parameters: Any) -> "DuckDBPyRelation":
        """Ask the run in SQL; see analysis.database for the views. $name takes parameters.

        Returns:
            A DuckDB relation: .pl(), .df(), .to_arrow_table(), .fetchnumpy(), ...
        """
        return self._database.sql(query, parameters)

    def plot(
        self,
        figures: Sequence[str] | None = None,
        out: str | Path | None = None,
        *,
        kde: Named | None = None,
        alpha: float | None = None,
        min_k: int | None = None,
        max_k: int | None = None,
        image: "Image" = "png",
        data: bool = False,
        left_out: Callable[[str, str], object] | None = None,
        progress: Progress | None = None,
    ) -> list[Path]:
        """Draw figures into files; return their paths.

        Args:
            figures: names, as bhlog plot --list has them; None draws all that the run can show.
            out: folder of the files; None is `figures` in the run's folder.
            kde: null model for p-values; None takes the run's own, or its empirical p-values.
            alpha: BH level to show; None takes the run's own, or 0.05 for a native run.
            min_k, max_k: where figures decide anew; None is as in the run.
            image: "png", "svg" or "pdf".
            data: whether the numbers behind each figure are written beside it too, as CSV.
            left_out: called with the name of a figure that the run cannot show, and why.
            progress: called with 1 after each figure.
        """
        from bhlog.analysis.figures.drawing import draw_figures

        return draw_figures(
            self,
            figures,
            out,
            kde=kde,
            alpha=alpha,
            bounds=Bounds(min_k, max_k),
            image=image,
            data=data,
            left_out=left_out,
            progress=progress,
        )

    def report(
        self,
        path: str | Path,
        *,
        kde: Named | None = None,
        also: Sequence[Log | str | Path] = (),
    ) -> Path | str:
        """Write one page about the run that opens from a disk; needs Bokeh.

        Args:
            path: file to write, or the URI of an object.
            kde: null model that the page holds the run against; None is the run's own.
            also: further runs to compare with it.

        Raises:
            MissingExtra: Bokeh is not installed.
        """
        needed("bokeh", "report")
        from bhlog.analysis.report.document import write_report
        from bhlog.analysis.report.subject import Subject

        kdes = [] if kde is None else [kde]
        subject = Subject([self, *map(_log, also)], kdes, tokenizer=self.tokenizer)
        return write_report(subject, path)

    def explore(
        self, *, kde: Named | None = None, also: Sequence[Log | str | Path] = ()
    ) -> "Explorer":
        """The alpha explorer in a notebook's output; arguments as of report.

        Raises:
            MissingExtra: Bokeh is not installed.
            KdeMismatch: there is no null model.
        """
        needed("bokeh", "report")
        from bhlog.analysis.report.embedded import explorer_of
        from bhlog.analysis.report.subject import Subject

        return explorer_of(Subject([self, *map(_log, also)], [] if kde is None else [kde]))

    def _repr_html_(self) -> str:
        facts = facts_of(self)
        names = ("model", "layers", "experts", "top_k", "routing", "alpha", "min_k", "max_k",
                 "null_model", "rows", "tokens", "nonfinite", "dropped", "sampled_out")  # fmt: skip
        known = {name: facts[name] for name in names if facts.get(name) not in (None, 0)}
        known["layers"] = len(facts["layers"])
        frame = pl.DataFrame({"fact": [*known], "value": [cell(one) for one in known.values()]})
        return small_table(frame, f"Run {self.path}")

    def verify(
        self,
        *,
        replay: bool = False,
        progress: Progress | None = None,
        executor: Executor | None = None,
    ) -> pl.DataFrame:
        """Is the run whole, and with `replay`, does replaying it give what it logged?

        Returns:
            A row for each finding: check, status ("ok", "warning" or "error"), where, detail.
        """
        from bhlog.analysis.verify.verification import findings_frame, verify, verify_decisions

        scope = Scope(progress=progress, executor=executor)
        findings = verify(self, scope)
        if replay:
            findings += verify_decisions(self, scope, after=findings)
        return findings_frame(findings)

    @cached_property
    def _database(self) -> "Database":
        from bhlog.analysis.database.connection import connect

        database = connect(self, tokenizer=self.tokenizer)
        # relations may outlive the run; an open connection complains when the interpreter ends
        atexit.register(database.close)
        return database


def open_log(path: str | Path, *, tokenizer: str | None = None) -> Run:
    """Open the folder of a run, a path or a URI such as s3://bucket/run; warn of missing files.

    The environment says where an object store is and who asks (AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID, ...), or the URI itself: s3://bucket/run?endpoint_override=HOST&scheme=http.

    Args:
        tokenizer: see Run.

    Raises:
        MissingRun: nothing there, not a run, or its storage cannot be reached.
        CorruptManifest: run.json cannot be read.
    """
    run = Run(path, tokenizer=tokenizer)
    if gap := run.gap:
        warnings.warn(gap, stacklevel=2)
    return run


def _log(run: Log | str | Path) -> Log:
    return run if isinstance(run, Log) else Run(run)
