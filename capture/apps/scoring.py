"""Scores: what benchmarks say of a model under native routing and under policies, each logged."""

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from bhlog.analysis.figures.benchmarks import Scored
from bhlog.analysis.imports import needed
from bhlog.analysis.run import Run, open_log
from bhlog.capture.apps.harness import harness_model, named_requests
from bhlog.capture.checkpoint import LoadedModel
from bhlog.capture.contract.errors import InvalidOption, RouterLogError, RunExists, one_line
from bhlog.capture.contract.files import make_folder, whole_file
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.observe import new_writer, recording
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.writing.fitting import KdeFit

NATIVE = "native"
SCORES = "scores"  # folder of what each setting scored, beside the runs
FIT = "fit"  # the run that a null model is fitted from


@dataclass(frozen=True)
class Exam:
    """What a model is asked.

    Attributes:
        tasks: of the harness, or of the YAML files in include_path.
        limit: documents of each task; None asks all.
        fit_docs: the first documents of each task, which a null model is fitted from and no score
            counts.
        num_fewshot: examples ahead of each document; None is as the task has it.
        batch_size: rows a forward, "auto" to search for it.
        include_path: folder of further tasks.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    fit_docs: int = 0
    num_fewshot: int | None = None
    batch_size: int | str = 1
    include_path: str | None = None

    def noted(self) -> dict[str, Any]:
        """What scores are compared by; the batch size may differ."""
        return {**asdict(self), "tasks": list(self.tasks), "batch_size": None}


@dataclass(frozen=True, eq=False)
class Setting:
    """Native routing, or a policy.

    Attributes:
        options: of the policy; None is native.
        kde: its null model, where it tests p-values.
    """

    options: BhOptions | None
    kde: KdeModel | None = None

    @classmethod
    def of(cls, options: BhOptions, kde: KdeModel | None) -> Self:
        """A policy under a null model, if it tests by one: of logits centred as the null's are."""
        if kde is None or not options.named.tests:
            return cls(options)
        return cls(replace(options, centre=kde.centre), kde)

    @property
    def text(self) -> str:
        """The policy's text, or native."""
        return NATIVE if self.options is None else str(self.options.named)

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return NATIVE if self.options is None else self.options.named.file_name

    @property
    def routing(self) -> Routing:
        """As a run has it."""
        return Routing() if self.options is None else Routing.by(self.options)

    def noted(self) -> dict[str, Any]:
        """What its scores hold for."""
        options = None if self.options is None else self.options.to_json()
        return {"options": options, "kde": None if self.kde is None else self.kde.sha256}


class Examiner:
    """A loaded model that sits exams of lm-evaluation-harness, and is logged.

    Args:
        loaded: the model.
        exam: what it is asked.
        out: folder of the runs, of their scores and of the run that a null model is fitted from.

    Raises:
        MissingExtra: the harness is not installed.
        InvalidOption: there is no such task.
        RouterLogError: a task cannot be loaded.
    """

    def __init__(self, loaded: LoadedModel, exam: Exam, out: str | Path) -> None:
        tasks = needed("lm_eval.tasks", "eval")
        self.loaded, self.exam, self.out = loaded, exam, Path(out)
        with _quiet():
            self._tasks = tasks.TaskManager(
                include_path=exam.include_path, include_defaults=exam.include_path is None
            )
            if not {*exam.tasks} <= {*self._tasks.all_tasks}:  # its own, thousands of files
                self._tasks = tasks.TaskManager(include_path=exam.include_path)
            unknown = [name for name in exam.tasks if name not in self._tasks.all_tasks]
            if unknown:
                near = get_close_matches(unknown[0], self._tasks.all_tasks, n=3)
                hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them"
                raise InvalidOption(f"no task '{unknown[0]}' in lm-evaluation-harness; {hint}")
            self._lm = harness_model(loaded, batch_size=exam.batch_size)
            self._documents = self._count_documents()

    @property
    def left_out(self) -> dict[str, range]:
        """Documents of each task that no score counts."""
        fit = self.exam.fit_docs
        return {task: range(min(fit, n)) for task, n in self._documents.items()} if fit else {}

    def check_new(self, settings: Sequence[Setting]) -> None:
        """Raise RunExists if a run or scores of a setting are there."""
        for setting in settings:
            run = self.out / setting.name
            if run.exists() or self._scores_of(setting).exists():
                raise RunExists(f"{run}: is there already; use --resume, or choose another --out")

    def _scores_of(self, setting: Setting) -> Path:
        return self.out / SCORES / f"{setting.name}.json"

    def fit(self, fit: KdeFit) -> KdeModel:
        """Fit a null model from the documents that no score counts, natively routed."""
        folder = self.out / FIT
        remove_run(folder)
        samples = {task: list(documents) for task, documents in self.left_out.items()}
        self._run(Setting(None), folder, samples, fit)
        return KdeModel.load(fit.out)

    def score(self, setting: Setting, *, resume: bool = False) -> None:
        """Ask everything under a setting: a run and its scores, each whole or not at all.

        Args:
            resume: skip what is finished, and begin again what is not.

        Raises:
            RunExists: it is there already and nothing is resumed.
            InvalidOption: what is finished was asked otherwise.
        """
        run, scores = self.out / setting.name, self._scores_of(setting)
        noted = {
            "model": self.loaded.model.config._name_or_path,
            "exam": self.exam.noted(),
            **setting.noted(),
        }
        if not resume:
            self.check_new([setting])
        if scores.exists():
            if json.loads(scores.read_text())["noted"] != noted:
                raise InvalidOption(
                    f"{scores}: scores of another model, exam or setting; ask the same again, or "
                    "choose another --out"
                )
            return
        remove_run(run)
        found = self._run(setting, run, self._scored())
        try:
            make_folder(scores.parent)
            with whole_file(scores) as file:
                file.write(json.dumps({"noted": noted, "tasks": found}, indent=1).encode())
        except OSError as error:
            raise InvalidOption(f"{scores}: cannot be written ({error.strerror})") from error

    def _scored(self) -> dict[str, list[int]] | None:
        """Documents of each task that scores count; None for the first `limit`."""
        fit, limit = self.exam.fit_docs, self.exam.limit
        if not fit:
            return None
        last = {
            task: n if limit is None else min(n, fit + limit) for task, n in self._documents.items()
        }
        return {task: list(range(fit, n)) for task, n in last.items()}

    def _run(
        self,
        setting: Setting,
        run: Path,
        samples: dict[str, list[int]] | None,
        fit: KdeFit | None = None,
    ) -> dict[str, Any]:
        patcher, routing = RouterPatcher(self.loaded.model), setting.routing
        patcher.check(routing, setting.kde)
        extra = {"eval": self.exam.noted()}
        writer = new_writer(run, patcher.info, routing, kde=setting.kde, extra=extra, fit=fit)
        with (
            recording(patcher, routing, setting.kde, writer, fit),
            named_requests(self._lm, patcher, samples),
        ):
            return self._evaluate(samples)

    def _evaluate(self, samples: dict[str, list[int]] | None) -> dict[str, Any]:
        evaluate = needed("lm_eval", "eval").simple_evaluate
        with _quiet(), _explained():
            results = evaluate(
                self._lm,
                tasks=list(self.exam.tasks),
                num_fewshot=self.exam.num_fewshot,
                limit=self.exam.limit if samples is None else None,
                samples=samples,
                task_manager=self._tasks,
            )
        return {
            task: _score_of(results["results"][task], documents)
            for task, documents in results["samples"].items()
        }

    def _count_documents(self) -> dict[str, int]:
        """Documents of each task that is asked, of those in groups too."""
        if not self.exam.fit_docs:
            return {}
        found: dict[str, int] = {}

        def count(tree: Mapping[Any, Any]) -> None:
            for name, task in tree.items():
                if isinstance(task, Mapping):
                    count(task)
                else:
                    found[str(name)] = len(task.eval_docs)

        with _explained():
            count(self._tasks.load_task_or_group(list(self.exam.tasks)))
        short = [task for task, n in found.items() if n <= self.exam.fit_docs]
        if short:
            raise InvalidOption(
                f"{short[0]} has {found[short[0]]} documents: --fit-docs {self.exam.fit_docs} "
                "leaves none to score"
            )
        return found


def scores(out: str | Path, settings: Sequence[Setting]) -> pl.DataFrame:
    """The scores of settings in a folder, native first.

    Returns:
        A row per setting, task and metric: policy, task, metric, score and score_se (the
        harness's), difference to native and difference_se (paired by documents; null where a metric
        is no mean over them), documents, mean_experts a token, flops (of experts, relative to
        native), loss (mean nll of the task's tokens, prompts and answers), run.
    """
    rows: list[dict[str, Any]] = []
    native: dict[str, Any] = {}
    for setting in settings:
        found = json.loads((Path(out) / SCORES / f"{setting.name}.json").read_text())["tasks"]
        native = native or found
        run = open_log(Path(out) / setting.name)
        costs = _costs(run)
        for task, score in found.items():
            experts, loss = costs.get(task, (None, None))
            for metric, (value, error) in score["metrics"].items():
                mine, theirs = (s["documents"].get(metric, {}) for s in (score, native[task]))
                gap, gap_se = _paired(mine, theirs)
                rows.append(
                    {
                        "policy": setting.text,
                        "task": task,
                        "metric": metric,
                        "score": value,
                        "score_se": error,
                        "difference": gap,
                        "difference_se": gap_se,
                        "documents": score["n"],
                        "mean_experts": experts,
                        "flops": None if experts is None else experts / run.manifest.model.top_k,
                        "loss": loss,
                        "run": run.path,
                    }
                )
    return pl.DataFrame(rows, infer_schema_length=None)


def scored(table: pl.DataFrame, model: str) -> Scored:
    """Scores as the figure takes them."""
    return Scored(table, (f"model {model}",))


def _costs(run: Run) -> dict[str, tuple[float, float]]:
    """Mean experts a token and mean loss of each task."""
    rows = run.sql(
        "WITH experts AS (SELECT rank, sequence, position, avg(n_selected) AS n FROM routing "
        "GROUP BY ALL) SELECT source, avg(n), avg(nll) FROM tokens "
        "JOIN experts USING (rank, sequence, position) GROUP BY source"
    ).fetchall()
    return {source: (experts, loss) for source, experts, loss in rows}


def _score_of(result: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of a task with their standard errors, and what each document has of them."""
    metrics: dict[str, list[Any]] = {}
    by_document: dict[str, dict[str, float]] = {}
    filters = {document["filter"] for document in documents}
    for key, value in result.items():
        name, _, kind = key.partition(",")
        if kind not in filters or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{name}_stderr,{kind}")
        label = name if len(filters) == 1 else f"{name},{kind}"
        metrics[label] = [float(value), float(error) if isinstance(error, int | float) else None]
        values = {
            str(document["doc_id"]): document[name]
            for document in documents
            if document["filter"] == kind and isinstance(document.get(name), int | float | bool)
        }
        if values and np.isclose(np.mean([*values.values()]), value):  # a mean over documents
            by_document[label] = {doc: float(x) for doc, x in values.items()}
    n = len({document["doc_id"] for document in documents})
    return {"metrics": metrics, "documents": by_document, "n": n}


def _paired(
    mine: Mapping[str, float], theirs: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """Mean difference over the documents, and its standard error: None for one alone."""
    gaps = np.array([mine[doc] - theirs[doc] for doc in mine if doc in theirs])
    if not len(gaps):
        return None, None
    error = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else None
    return float(gaps.mean()), error


def remove_run(run: Path) -> None:
    """Remove a run that was cut off."""
    if run.exists():
        open_log(run)  # raises if it is something else
        shutil.rmtree(run)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's notes; what it prints goes to stderr, where results are not."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say in a line why the harness cannot ask: a data set that is not here has many names."""
    try:
        yield
    except (RouterLogError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        words = one_line(str(error).strip().splitlines()[0] if str(error).strip() else "")
        raise RouterLogError(
            f"lm-evaluation-harness: {type(error).__name__} ({words}); is the task's data here, or "
            "on the hub?"
        ) from error
