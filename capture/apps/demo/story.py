"""The story that `bhlog demo` tells: capture, fit, route, replay, check, ask, draw."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.database.question import find_question
from bhlog.analysis.output import write
from bhlog.analysis.replay.losses import loss_of
from bhlog.analysis.run import Run, open_log
from bhlog.analysis.verify.replayed import verify_replay
from bhlog.capture.apps.demo.corpus import Page, held_out_documents, training_documents
from bhlog.capture.apps.demo.equal_budget import (
    BUDGETS,
    FAMILIES,
    MAX_K,
    mean_experts,
    reruns,
    run_name,
    told,
)
from bhlog.capture.checkpoint import LoadedModel, load_model
from bhlog.capture.contract.errors import MissingExtra, RunExists
from bhlog.capture.contract.manifest import MANIFEST_NAME, Routing
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.documents import Document
from bhlog.capture.session import capture
from bhlog.capture.text import Window, windows
from bhlog.capture.writing.writer import RunWriter

ALPHA = 0.3
ALPHAS = (0.01, 0.05, 0.1, 0.3, 0.5)
FIT_TOKENS = 16_384  # of each source
HELD_OUT_TOKENS = 8_192  # of each source
MAX_LENGTH = 512
PIECE = 2 * MAX_LENGTH  # characters taken of a document, so that many documents are heard


def tell(out: Path) -> None:
    """Run the demonstration into a folder and print what it found.

    Raises:
        RunExists: the folder holds something other than an earlier demo.
    """
    started = time.monotonic()
    _make_room(out)
    loaded = load_model("demo")
    config = loaded.model.config
    fitting = _windows(training_documents(), loaded, FIT_TOKENS)
    held_out = _windows(held_out_documents(), loaded, HELD_OUT_TOKENS)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    say = Console(highlight=False, soft_wrap=True).print

    say("[bold]1. A model and real text[/]")
    say(
        f"OLMoE, {parameters / 1e6:.1f} M parameters, {config.num_hidden_layers} layers, "
        f"{config.num_experts} experts, top-{config.num_experts_per_tok}, trained on Python's own "
        "documentation and sources.\nIt reads bytes, so a token is a byte here: "
        f"{_count(fitting):,} to fit a null model from, {_count(held_out):,} held out, which "
        "training never saw."
    )

    say("\n[bold]2. Capture native routing and fit a null model of each layer's logits[/]")
    _run(loaded, fitting, out / "fit", Routing(), None)
    # without the experts that the model chose: the signal must not sit in its own null
    options = FitOptions(trim_high=config.num_experts_per_tok)
    kde = open_log(out / "fit").fit(options)
    kde.save(out / "null.parquet")
    say(
        f"{out / 'fit'} -> {out / 'null.parquet'}: {len(kde)} layers, "
        f"{kde[0].curves[0].n:,} logits each"
    )

    say("\n[bold]3. Capture the held-out text, routed natively and by BH[/]")
    _run(loaded, held_out, out / "native", Routing(), None)
    native = open_log(out / "native")
    by_alpha: dict[float, Run] = {}
    for alpha in ALPHAS:
        run = out / f"bh-{alpha}"
        _run(loaded, held_out, run, Routing.by(BhOptions(alpha, max_k=MAX_K)), kde)
        by_alpha[alpha] = open_log(run)
    totals = native.manifest.totals
    size = sum(shard.bytes for shard in native.manifest.shards)
    say(
        f"native: {totals.tokens:,} tokens, {totals.rows:,} rows, {size / totals.rows:.0f} bytes a "
        f"row, loss {loss_of(native).mean:.3f} nats a token"
    )

    say(
        "\n[bold]4. What would BH have done?[/] Replayed from the native log, and rerun for real, "
        f"with at most {MAX_K} experts.\nMean experts a token, replayed by layer and over all; "
        "beside it what a rerun gave, and its loss in nats."
    )
    write(_what_if(native, by_alpha, kde))
    say(
        f"\nNative routing: {config.num_experts_per_tok} experts, loss "
        f"{loss_of(native).mean:.3f}. A replay holds the hidden states fixed, so it is exact"
        "\nfor the first layer and an estimate "
        f"below it. Replayed against rerun at alpha {ALPHA}:\n"
    )
    write(native.fidelity(by_alpha[ALPHA]).select(pl.exclude("^.*_se$")))

    say(
        f"\nIs BH worth it? Every policy brought to {' and '.join(map(str, BUDGETS))} experts by "
        "its parameter, and run: loss in nats, and\nhow much more than native "
        f"top-{config.num_experts_per_tok}, with standard errors clustered by sequence.\n"
    )

    def run_by(run: Path, routing: Routing, null: KdeModel | None) -> None:
        _run(loaded, held_out, run, routing, null)

    table, words = told(native, reruns(native, kde, out, run_by))
    write(table)
    say("\n" + "\n".join(words))

    bh = by_alpha[ALPHA]
    say(f"\n[bold]5. Does replay reproduce what {bh.name} logged?[/]")
    check = verify_replay(bh)
    say(f"{check['rows'].sum():,} rows replayed, {check['mismatches'].sum()} disagree")

    say("\n[bold]6. Ask in SQL, and draw[/]")
    write(_ask(say, bh, "experts_per_token"))
    write(_ask(say, native, "experts_by_source", top="4"))
    figures = bh.plot()
    say(f"\n{len(figures)} figures in {figures[0].parent}")
    say(_report(native, bh, out))
    say(f"[bold]Done in {time.monotonic() - started:.0f} s.[/]")


def _report(native: Run, bh: Run, out: Path) -> str:
    """Write the page about the runs; what to do where Bokeh is missing."""
    try:
        page = native.report(out / "report.html", kde=out / "null.parquet", also=[bh])
    except MissingExtra as error:
        return f"For a page to explore it all, {error}"
    return f"All of it on one page, with an alpha to move: open {page}"


def _what_if(native: Run, by_alpha: dict[float, Run], kde: KdeModel) -> pl.DataFrame:
    """A row per alpha: what replay says of the native log, and what rerunning gave."""
    summary = native.replay(ALPHAS, max_k=MAX_K, kde=kde)
    rows: list[dict[str, Any]] = []
    for alpha in ALPHAS:
        mine = summary.filter(pl.col("alpha") == alpha)
        overall = mine.filter(pl.col("layer").is_null()).row(0, named=True)
        rows.append(
            {
                "alpha": alpha,
                **{
                    f"layer {layer}": mean
                    for layer, mean in mine.drop_nulls("layer")
                    .select("layer", "mean_experts")
                    .iter_rows()
                },
                "replayed": overall["mean_experts"],
                "rerun": mean_experts(by_alpha[alpha]),
                "probability kept": overall["probability_kept"],
                "top-k overlap": overall["native_recall"],
                "loss": loss_of(by_alpha[alpha]).mean,
            }
        )
    return pl.DataFrame(rows)


def _ask(say: Callable[[str], None], log: Run, name: str, **params: str) -> pl.DataFrame:
    """The answer to a question of sql/; says which command gives it."""
    question = find_question(name)
    given = "".join(f" --param {key}={value}" for key, value in params.items())
    say(f"\nbhlog sql {log.path} --query {name}{given}")
    answer: pl.DataFrame = log.sql(question.text, **question.values(params)).pl()
    return answer


def _run(
    loaded: LoadedModel,
    texts: Sequence[Window],
    run: Path,
    routing: Routing,
    kde: KdeModel | None,
) -> None:
    with progress_bar(f"{run.name:8}", _count(texts), unit="tokens") as advance:

        def progress(tokens: int, writer: RunWriter) -> None:
            advance(tokens)

        capture(loaded, texts, run, routing=routing, kde=kde, progress=progress)


def _windows(pages: Sequence[Page], loaded: LoadedModel, tokens: int) -> list[Window]:
    """Windows from the middle of many documents, the same number of tokens of each source."""
    chosen: list[Document] = []
    for source in dict.fromkeys(page.source for page in pages):
        mine = [page for page in pages if page.source == source and len(page.text) >= PIECE]
        step = max(1, len(mine) * PIECE // tokens)
        pieces = max(PIECE, tokens // len(mine[::step]))
        for page in mine[::step]:
            start = max(0, len(page.text) - pieces) // 2  # past the licence and the imports
            chosen.append(Document(source, page.text[start : start + pieces]))
    return windows(chosen, loaded.tokenizer, max_length=MAX_LENGTH, max_tokens=tokens)


def _count(texts: Sequence[Window]) -> int:
    return sum(len(window.token_ids) for window in texts)


def _make_room(out: Path) -> None:
    """Remove an earlier demo; refuse a folder that holds anything else.

    Raises:
        RunExists: the folder holds other files.
    """
    files = {"null.parquet", "report.html"}
    ours = {"fit", "native", *files, *(f"bh-{alpha}" for alpha in ALPHAS)}
    ours |= {run_name(family, budget) for family in FAMILIES for budget in BUDGETS}
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    runs = [out / name for name in (found & ours) - files]
    if not found <= ours or not all((run / MANIFEST_NAME).exists() for run in runs):
        raise RunExists(f"{out}: holds files that are not of an earlier demo; choose another --out")
    for run in runs:
        shutil.rmtree(run)
    out.mkdir(parents=True, exist_ok=True)
