"""`bhlog capture` and `bhlog demo`. Torch is imported when a command runs."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bhlog.capture.contract.errors import InvalidOption

EPILOG = """\b
examples:
  bhlog capture demo --text notes.txt --out runs/native --fit-kde null.parquet --trim-high 8
  bhlog capture demo --text notes.txt --out runs/bh --route bh --alpha 0.3 --kde null.parquet
"""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the hub.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="PATH",
    help="Text file, JSON-lines file, or a folder of them; repeatable. Each file is a source.",
)
@click.option("--out", required=True, metavar="RUN", help="Folder of the run to write.")
@click.option(
    "--route",
    type=click.Choice(["native", "bh"]),
    default="native",
    show_default=True,
    help="Observe the model's own routing, or route by Benjamini-Hochberg.",
)
@click.option("--alpha", type=float, default=0.05, show_default=True, help="BH level, 0 < A < 1.")
@click.option("--kde", metavar="FILE", help="Null model for BH routing.")
@click.option("--empirical", is_flag=True, help="BH without a null model: p-values by batch rank.")
@click.option("--min-k", type=int, default=1, show_default=True, help="Fewest experts a token.")
@click.option("--max-k", type=int, help="Most experts a token (default: all).")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the weights.")
@click.option(
    "--renormalize",
    type=click.Choice(["model", "yes", "no"]),
    default="model",
    show_default=True,
    help="Make BH weights sum to 1: as the model does with its own, always, never.",
)
@click.option("--field", default="text", show_default=True, help="Text field of JSON lines.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Windows a forward.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens a window.")
@click.option("--max-tokens", type=int, help="Tokens to read of each source (default: all).")
@click.option("--generate", type=int, default=0, metavar="N", help="Then generate N new tokens.")
@click.option(
    "--sample-every",
    type=int,
    default=1,
    metavar="N",
    help="Log the tokens at every N-th position, at every layer.",
)
@click.option("--no-token-ids", is_flag=True, help="Withhold token ids from the log.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@click.option(
    "--on-full",
    type=click.Choice(["block", "drop"]),
    default="block",
    show_default=True,
    help="When the disk is slower than the model: wait, or drop tokens and count them.",
)
@click.option(
    "--fit-kde",
    metavar="FILE",
    help="Fit a null model from what is logged, as bhlog kde fit would from the run.",
)
@click.option(
    "--trim-high",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="For --fit-kde: leave out each row's N largest logits.",
)
@click.option(
    "--trim-low",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="For --fit-kde: leave out each row's N smallest logits.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was cut off.")
@click.option(
    "--allow-missing-layers",
    is_flag=True,
    help="Leave out layers whose router is not known, if others are.",
)
def capture(
    model: str,
    revision: str | None,
    texts: tuple[str, ...],
    out: str,
    route: str,
    alpha: float,
    kde: str | None,
    empirical: bool,
    min_k: int,
    max_k: int | None,
    temperature: float,
    renormalize: str,
    field: str,
    batch_size: int,
    max_length: int,
    max_tokens: int | None,
    generate: int,
    sample_every: int,
    no_token_ids: bool,
    device: str,
    dtype: str,
    on_full: Any,
    fit_kde: str | None,
    trim_high: int,
    trim_low: int,
    resume: bool,
    allow_missing_layers: bool,
) -> None:
    """Run text through a model and log its routing.

    MODEL is a folder, a hub name, or `demo`, the bundled model.
    """
    from bhlog.analysis.output import progress_bar
    from bhlog.capture.contract.manifest import Routing
    from bhlog.capture.contract.null.model import KdeModel
    from bhlog.capture.contract.rule import RENORMALIZE, BhOptions
    from bhlog.capture.text import digest, read_documents, windows
    from bhlog.capture.writing.folder import check_new
    from bhlog.capture.writing.launch import rank

    routing, null = Routing(), None
    if route == "bh":
        bh = BhOptions(
            alpha=alpha,
            min_k=min_k,
            max_k=max_k,
            temperature=temperature,
            renormalize=RENORMALIZE[renormalize],
            p_values="empirical" if empirical else "kde",
        )
        if kde is None and resume and not empirical and (Path(out) / "kde.parquet").exists():
            kde = str(Path(out) / "kde.parquet")
        bh.check_null(kde)
        routing, null = Routing("bh", bh), None if kde is None else KdeModel.load(kde)
    else:
        _refuse("alpha", "kde", "empirical", "min_k", "max_k", "temperature", "renormalize")
    if fit_kde is None and (trim_low or trim_high):
        raise InvalidOption("--trim-high and --trim-low are for --fit-kde: name its file")
    if not resume and rank() == 0:
        check_new(Path(out))
    documents = list(read_documents(texts, field=field))

    # from here on torch, which takes seconds to import
    from bhlog.capture.session import CaptureOptions, load_model, n_tokens, share
    from bhlog.capture.session import capture as run_capture
    from bhlog.capture.writing.fitting import KdeFit
    from bhlog.capture.writing.writer import RunWriter, WriterOptions

    fit = None if fit_kde is None else KdeFit(fit_kde, trim_low=trim_low, trim_high=trim_high)
    options = CaptureOptions(
        batch_size=batch_size,
        generate=generate,
        allow_missing_layers=allow_missing_layers,
        writer=WriterOptions(
            sample_every=sample_every, token_ids=not no_token_ids, on_full=on_full
        ),
    )
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    texts_cut = windows(documents, loaded.tokenizer, max_length=max_length, max_tokens=max_tokens)
    noted = {
        "batch_size": batch_size,
        "max_length": max_length,
        "generate": generate,
        "windows": len(texts_cut),
        "windows_sha256": digest(texts_cut),
    }
    total = n_tokens(share(texts_cut), generate)
    with _interruptible(out), progress_bar(Path(out).name, total, unit="tokens") as advance:
        lines = _ProgressLines(out, total)

        def progress(tokens: int, writer: RunWriter) -> None:
            advance(tokens, note=f"{writer.bytes_written / 1e6:.1f} MB")
            lines.advance(tokens, writer.bytes_written)

        manifest = run_capture(
            loaded,
            texts_cut,
            out,
            routing=routing,
            kde=null,
            options=options,
            extra=noted,
            resume=resume,
            fit=fit,
            progress=progress,
        )
    totals, size = manifest.totals, sum(shard.bytes for shard in manifest.shards)
    click.echo(
        f"{out}: {totals.tokens:,} tokens, {totals.rows:,} rows in {totals.shards} shards, "
        f"{size / 1e6:.1f} MB ({size / max(1, totals.rows):.0f} bytes a row)"
    )
    for name, count in (("dropped", totals.dropped), ("sampled out", totals.sampled_out)):
        if count:
            click.echo(f"{count:,} tokens {name}")
    if totals.nonfinite:
        click.echo(f"{totals.nonfinite:,} rows with NaN or infinite logits, logged as they are")


def _refuse(*names: str) -> None:
    """Raise InvalidOption if one of the options, which mean nothing here, was given.

    Somebody who forgets --route bh would get a long run of the wrong kind.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise InvalidOption(f"{option} needs --route bh: native routing is the model's own")


class _ProgressLines:
    """A line on stderr now and then where it is a file, in which a bar cannot move."""

    EVERY_SECONDS = 30.0

    def __init__(self, run: str, total: int) -> None:
        self._run, self._total, self._done = run, total, 0
        self._first: tuple[float, int] | None = None  # when speed is measured from
        self._said = time.monotonic()

    def advance(self, tokens: int, n_bytes: int) -> None:
        """Tokens just done, and the bytes on disk by now."""
        now = time.monotonic()
        self._done += tokens
        if self._first is None:
            self._first = now, self._done
        if sys.stderr.isatty() or now - self._said < self.EVERY_SECONDS:
            return
        self._said = now
        speed = (self._done - self._first[1]) / max(1e-9, now - self._first[0])
        click.echo(
            f"{self._run}: {self._done:,} of {self._total:,} tokens, {speed:,.0f} tokens/s, "
            f"{n_bytes / 1e6:.1f} MB",
            err=True,
        )


@contextmanager
def _interruptible(run: str) -> Iterator[None]:
    """A block that SIGTERM, which job schedulers send, interrupts as Ctrl-C does."""
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if (Path(run) / "run.json").exists():
            click.echo(f"{run} is closed; the same command with --resume goes on with it", err=True)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@click.command(epilog="\b\nexample:\n  bhlog demo --out runs/demo")
@click.option(
    "--out",
    default="runs/demo",
    show_default=True,
    metavar="DIR",
    help="Where runs, null model and figures are written; an earlier demo there is replaced.",
)
def demo(out: str) -> None:
    """The whole story in a minute: capture, fit, route, replay, check, ask, draw.

    Runs a small trained OLMoE that ships with bhlog over Python's own documentation and sources.
    """
    from bhlog.capture.apps.demo.story import tell

    tell(Path(out))
