"""`bhlog capture` and `bhlog demo`. Torch is imported when a command runs."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import OUT_FOLDER, OUT_PLACE
from bhlog.capture.apps.asked import (
    Fit,
    Model,
    Pace,
    Rule,
    fit_options,
    model_options,
    pace_options,
    rule_options,
)
from bhlog.capture.apps.asked_text import Texts, texts_options
from bhlog.capture.apps.watch import ProgressLines, in_bytes, interruptible
from bhlog.capture.writing.launch import rank

if TYPE_CHECKING:
    from bhlog.capture.contract.manifest import Manifest

EPILOG = """\b
examples:
  bhlog capture demo --text notes.txt --out runs/native --fit-kde null.parquet --trim-high 8
  bhlog capture demo --text notes.txt --out runs/bh --route bh --alpha 0.3 --kde null.parquet
"""


@click.command(epilog=EPILOG)
@model_options
@texts_options
@click.option(
    "--out", required=True, type=OUT_PLACE, metavar="RUN", help="Folder or URI of the run to write."
)
@rule_options
@pace_options
@fit_options
@click.option("--resume", is_flag=True, help="Continue a run that was cut off.")
def capture(
    model: Model, texts: Texts, out: str, rule: Rule, pace: Pace, fit: Fit, resume: bool
) -> None:
    """Run text through a model and log its routing.

    MODEL is a folder, a hub name, or `demo`, the bundled model.
    """
    from bhlog.capture.writing.folder import check_new
    from bhlog.capture.writing.place import Place

    place = Place.of(out, pace.staging, rank())
    routing, null = rule.routing(resumed=place if resume else None)
    fit.make_room()
    if not resume and rank() == 0:
        check_new(place)
    if resume:
        texts.require_again()
    full: set[str] = set()
    documents, sums = texts.read(full), texts.sha256()

    # from here on torch, which takes seconds to import
    from bhlog.capture.session import capture as run_capture
    from bhlog.capture.session import n_tokens, share
    from bhlog.capture.writing.writer import RunWriter

    options = pace.options()
    loaded = model.load()
    windows, known = texts.cut(documents, loaded.tokenizer, full, answers=options.generate > 0)
    total = None if known is None else n_tokens(share(known), options.generate)
    with interruptible(place), progress_bar(place.name, total, unit="tokens") as advance:
        lines = ProgressLines(str(place), total)

        def progress(tokens: int, writer: RunWriter) -> None:
            sealed = writer.bytes_written  # none before the first shard is sealed
            advance(tokens, note=in_bytes(sealed) if sealed else "")
            lines.advance(tokens, sealed)

        manifest = run_capture(
            loaded,
            windows,
            out,
            routing=routing,
            kde=null,
            options=options,
            extra={**pace.noted(), **model.noted(), **texts.noted(sums)},
            text_sha256=sums,
            resume=resume,
            fit=fit.kde_fit(),
            progress=progress,
        )
    _say(str(place), manifest)


def _say(out: str, manifest: "Manifest") -> None:
    """What was logged, and what was not."""
    totals, size = manifest.totals, sum(shard.bytes for shard in manifest.shards)
    shards = f"{totals.shards:,} shard{'s' * (totals.shards != 1)}"
    a_row = f"{size / max(1, totals.rows):.0f} bytes a row"
    click.echo(
        f"{out}: {totals.tokens:,} tokens, {totals.rows:,} rows in {shards}, {in_bytes(size)} "
        f"({a_row})"
    )
    for name, count in (("dropped", totals.dropped), ("sampled out", totals.sampled_out)):
        if count:
            click.echo(f"{count:,} tokens {name}")
    if totals.nonfinite:
        click.echo(f"{totals.nonfinite:,} rows with NaN or infinite logits, logged as they are")


@click.command(epilog="\b\nexample:\n  bhlog demo --out runs/demo")
@click.option(
    "--out",
    default="runs/demo",
    show_default=True,
    type=OUT_FOLDER,
    metavar="DIR",
    help="Where runs, null model and figures are written; an earlier demo there is replaced.",
)
def demo(out: str) -> None:
    """The whole story in a minute: capture, fit, route, replay, check, ask, draw.

    Runs a small trained OLMoE that ships with bhlog over Python's own documentation and sources.
    """
    from bhlog.capture.apps.demo.story import tell

    tell(Path(out))
