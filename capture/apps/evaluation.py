"""`bhlog eval`: benchmark scores under native routing and under policies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bhlog.analysis.commands.kinds import ALPHA, KDE, OUT_FOLDER, POLICY, PathKind
from bhlog.analysis.commands.options import (
    Output,
    check_figure,
    figure_option,
    load_null,
    output_options,
    write_figure,
)
from bhlog.analysis.imports import needed
from bhlog.capture.apps.asked import Fit, Model, as_bh, fit_options, model_options
from bhlog.capture.apps.watch import interruptible
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.documents import read_documents

if TYPE_CHECKING:
    from bhlog.capture.apps.scoring import Examiner
    from bhlog.capture.checkpoint import LoadedModel
    from bhlog.capture.contract.named import Bh
    from bhlog.capture.contract.null.model import KdeModel
    from bhlog.capture.contract.rule import BhOptions

MAX_LENGTH = 512  # tokens of a window of --fit-text
SHORT = (
    "policy",
    "task",
    "metric",
    "score",
    "score_se",
    "difference",
    "difference_se",
    "mean_experts",
    "flops",
    "loss",
    "run",
)


@dataclass(frozen=True)
class Null:
    """Where the null model comes from: a file, or a fit from text or from documents."""

    kde: str | None
    fit: Fit
    texts: tuple[str, ...]
    fit_docs: int

    def check(self, tested: Sequence[str]) -> None:
        """Check that policies that test p-values have one, and that it is one.

        Raises:
            InvalidOption: it is not said where from, or said twice.
        """
        fits = bool(self.texts) + bool(self.fit_docs)
        if (self.fit.fit_kde is not None) != (fits == 1) or fits > 1:
            raise InvalidOption(
                "--fit-kde FILE goes with one of --fit-text PATH and --fit-docs N, and they with it"
            )
        if self.kde is not None and fits:
            raise InvalidOption("give --kde or --fit-kde, not both")
        if tested and self.kde is None and not fits:
            raise InvalidOption(
                f"{tested[0]} needs a null model: --kde FILE, or --fit-kde FILE with --fit-text "
                "PATH or --fit-docs N"
            )

    def of(
        self, loaded: "LoadedModel", examiner: "Examiner", out: str, *, resume: bool
    ) -> "KdeModel | None":
        """The model, fitted if it is to be; a fit that is finished is kept on resuming."""
        from bhlog.capture.apps.scoring import FIT, remove_run
        from bhlog.capture.session import capture
        from bhlog.capture.text import windows

        if self.kde is not None:
            return load_null(self.kde)
        fit = self.fit.kde_fit()
        if fit is None:
            return None
        if resume and Path(fit.out).exists():
            return load_null(str(fit.out))
        self.fit.make_room()
        if self.fit_docs:
            return examiner.fit(fit)
        run = Path(out) / FIT
        remove_run(run)
        documents = list(read_documents(self.texts))
        texts = windows(documents, loaded.tokenizer, max_length=MAX_LENGTH)
        capture(loaded, texts, run, fit=fit)
        return load_null(str(fit.out))


@click.command(
    epilog="\b\nexamples:\n"
    "  bhlog eval allenai/OLMoE-1B-7B-0924 --tasks arc_easy,hellaswag --limit 200 \\\n"
    "      --alpha 0.05 --alpha 0.3 --policy topk:4 --fit-kde null.parquet --fit-docs 50 \\\n"
    "      --trim-high 8 --out runs/eval\n"
    "  bhlog eval demo --tasks mine --include-path tasks/ --policy minp:0.2 --out runs/mine"
)
@model_options
@click.option("--tasks", required=True, metavar="NAME[,NAME...]", help="Tasks of lm-eval.")
@click.option(
    "--out", required=True, type=OUT_FOLDER, metavar="RUNS", help="Folder: a run a setting."
)
@click.option(
    "--alpha",
    "alphas",
    multiple=True,
    type=ALPHA,
    metavar="A|FILE",
    help="Route by bh:A, or by the alphas of a file, one for each layer; repeatable.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=POLICY,
    help="Route by it, such as topk:4 or minp:0.2; repeatable.",
)
@click.option("--kde", type=KDE, metavar="FILE", help="Null model for bh and by.")
@fit_options
@click.option(
    "--fit-text",
    multiple=True,
    type=PathKind("file"),
    metavar="PATH",
    help="For --fit-kde: text to fit from; repeatable.",
)
@click.option(
    "--fit-docs",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="For --fit-kde: fit from the first N documents of each task, which no score counts.",
)
@click.option("--min-k", type=int, default=1, show_default=True, help="Fewest experts a token.")
@click.option("--max-k", type=int, help="Most experts a token (default: all).")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Score N documents of each task."
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples (default: the task's).")
@click.option(
    "--batch-size", default="8", show_default=True, metavar="N|auto", help="Requests a forward."
)
@click.option(
    "--include-path", type=PathKind("dir"), metavar="DIR", help="Folder of further tasks in YAML."
)
@click.option("--resume", is_flag=True, help="Skip settings that are finished.")
@figure_option
@output_options("--table")
def evaluate(
    model: Model,
    tasks: str,
    out: str,
    alphas: "tuple[float | Bh, ...]",
    policies: tuple[str, ...],
    kde: str | None,
    fit: Fit,
    fit_text: tuple[str, ...],
    fit_docs: int,
    min_k: int,
    max_k: int | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: str,
    include_path: str | None,
    resume: bool,
    figure: str | None,
    output: Output,
) -> None:
    """Benchmark scores of a model under native routing and under policies.

    Runs lm-evaluation-harness under each, the model loaded once, and logs each as a run; SQL then
    finds documents and requests by `source` and `sample_id`. Differences to native are paired by
    documents. Needs pip install "bhlog[eval]".
    """
    rules = _rules(alphas, policies, min_k, max_k)
    null = Null(kde, fit, fit_text, fit_docs)
    null.check([str(rule.named) for rule in rules if rule.named.tests])
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size)):
        raise InvalidOption(f"--batch-size must be a whole number above 0 or auto: {batch_size}")
    check_figure(figure)
    needed("lm_eval", "eval")

    # from here on torch, which takes seconds to import
    from bhlog.capture.apps.scoring import Exam, Examiner, Setting, scored, scores
    from bhlog.capture.writing.place import Place

    exam = Exam(
        tuple(name.strip() for name in tasks.split(",") if name.strip()),
        limit,
        fit_docs,
        num_fewshot,
        batch_size if batch_size == "auto" else int(batch_size),
        include_path,
    )
    with interruptible(Place.of(out)):
        loaded = model.load()
        examiner = Examiner(loaded, exam, out)
        if not resume:
            examiner.check_new([Setting(None), *map(Setting, rules)])
        found = null.of(loaded, examiner, out, resume=resume)
        settings = [Setting(None)]
        settings += [Setting.of(rule, found) for rule in rules]
        for i, setting in enumerate(settings):
            click.echo(f"{i + 1} of {len(settings)}: {setting.text}", err=True)
            examiner.score(setting, resume=resume)
    for task, documents in examiner.left_out.items():
        click.echo(
            f"{task}: documents 0-{documents.stop - 1} fitted the null, not scored", err=True
        )
    table = scores(out, settings)
    output.write(table.select(SHORT) if output.for_people else table)
    if figure is not None:
        write_figure("scores", "scores", scored(table, model.name), figure)


def _rules(
    alphas: "Sequence[float | Bh]", policies: Sequence[str], min_k: int, max_k: int | None
) -> "list[BhOptions]":
    """Each rule, those of --alpha first.

    Raises:
        InvalidOption: one is wrong, or asked for twice.
    """
    from bhlog.capture.contract.named import Named
    from bhlog.capture.contract.rule import BhOptions

    asked: list[Named | str] = [*map(as_bh, alphas), *policies]
    rules = [BhOptions.of(one, min_k=min_k, max_k=max_k) for one in asked]
    names = [str(rule.named) for rule in rules]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidOption(f"{twice[0]} is asked for twice")
    return rules
