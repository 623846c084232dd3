"""What `bhlog capture` is asked for: bundles of its options, each of which does its own part."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bhlog.analysis.commands.kinds import ALPHA, KDE, OUT_FILE, OUT_FOLDER, PathKind
from bhlog.analysis.commands.options import bundle, centre_option, load_null, make_room
from bhlog.capture.contract.errors import InvalidOption

if TYPE_CHECKING:
    from bhlog.capture.checkpoint import LoadedModel
    from bhlog.capture.contract.manifest import Routing
    from bhlog.capture.contract.named import Bh
    from bhlog.capture.contract.null.model import KdeModel
    from bhlog.capture.session import CaptureOptions
    from bhlog.capture.writing.fitting import KdeFit
    from bhlog.capture.writing.place import Place


_NATIVE = "needs --route bh or another policy: native routing is the model's own"


@dataclass(frozen=True)
class Model:
    """The model to run; see bhlog.capture.checkpoint.load_model."""

    name: str
    revision: str | None
    device: str
    device_map: str | None
    dtype: str
    attn: str | None
    quantize: str | None
    adapter: str | None
    trust_remote_code: bool
    tokenizer: str | None

    def load(self) -> "LoadedModel":
        """Load it."""
        from bhlog.capture.checkpoint import load_model

        if self.trust_remote_code:
            click.echo(f"{self.name}: code that comes with the model is run", err=True)
        return load_model(**asdict(self))

    def noted(self) -> dict[str, Any]:
        """What the manifest keeps: how it was loaded, where that was asked for."""
        options = asdict(self)
        names = "device_map", "attn", "quantize", "adapter", "trust_remote_code"
        return {name: options[name] for name in names if options[name]}


@dataclass(frozen=True)
class Rule:
    """How experts are chosen; see bhlog.capture.contract.rule.BhOptions."""

    route: str
    alpha: "float | Bh"
    kde: str | None
    empirical: bool
    min_k: int
    max_k: int | None
    temperature: float
    renormalize: str
    centre: str

    def routing(self, *, resumed: "Place | None") -> "tuple[Routing, KdeModel | None]":
        """The rule and its null model.

        Args:
            resumed: the run that is continued, whose null model serves; None for a new run.

        Raises:
            InvalidOption: an option is out of range, or means nothing under native routing.
            KdeMismatch: BH routing lacks a null model.
        """
        from bhlog.capture.contract.manifest import Routing
        from bhlog.capture.contract.rule import RENORMALIZE, BhOptions

        if self.route == "native":
            _refuse(*(name for name in asdict(self) if name != "route"))
            return Routing(), None
        if self.route != "bh":
            _refuse("alpha", why=f"is for --route bh: {self.route} has a value of its own")
        options = BhOptions.of(
            self.route if self.route != "bh" else as_bh(self.alpha),
            min_k=self.min_k,
            max_k=self.max_k,
            temperature=self.temperature,
            renormalize=RENORMALIZE[self.renormalize],
            p_values="empirical" if self.empirical else "kde",
            centre=self.centre,
        )
        kde = self.kde
        tests = options.named.tests
        if kde is None and resumed is not None and tests and not self.empirical:
            own = resumed.null()
            if own is not None:
                return Routing.by(options), own
        options.check_null(kde)
        return Routing.by(options), None if kde is None else load_null(kde)


@dataclass(frozen=True)
class Pace:
    """How text is run and logged; see bhlog.capture.session.CaptureOptions and WriterOptions."""

    batch_size: int
    generate: int
    sample_every: int
    no_token_ids: bool
    on_full: Any
    shard_rows: int
    seal_seconds: float
    store_seconds: float
    staging: str | None
    allow_missing_layers: bool

    def options(self) -> "CaptureOptions":
        """As a session takes them.

        Raises:
            InvalidOption: one is out of range.
        """
        from bhlog.capture.session import CaptureOptions
        from bhlog.capture.writing.writer import WriterOptions

        writer = WriterOptions(
            sample_every=self.sample_every,
            token_ids=not self.no_token_ids,
            on_full=self.on_full,
            shard_rows=self.shard_rows,
            seal_seconds=self.seal_seconds,
            store_seconds=self.store_seconds,
            staging=self.staging,
        )
        return CaptureOptions(
            batch_size=self.batch_size,
            generate=self.generate,
            allow_missing_layers=self.allow_missing_layers,
            writer=writer,
        )

    def noted(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {"batch_size": self.batch_size, "generate": self.generate}


@dataclass(frozen=True)
class Fit:
    """The null model to fit from what is logged, if any; see bhlog.capture.writing.fitting."""

    fit_kde: str | None
    trim_high: int
    trim_low: int
    null_from: Any
    fit_centre: Any

    def __post_init__(self) -> None:
        if self.fit_kde is None:
            why = "is for --fit-kde: name its file"
            _refuse("trim_high", "trim_low", "null_from", "fit_centre", why=why)

    def make_room(self) -> None:
        """Make the folder of its file."""
        if self.fit_kde is not None:
            make_room(self.fit_kde)

    def kde_fit(self) -> "KdeFit | None":
        """As a session takes it."""
        from bhlog.capture.writing.fitting import KdeFit

        if self.fit_kde is None:
            return None
        return KdeFit(
            self.fit_kde,
            trim_low=self.trim_low,
            trim_high=self.trim_high,
            null_from=self.null_from,
            centre=self.fit_centre,
        )


def as_bh(alpha: "float | Bh") -> "Bh":
    """BH at a level, which may be one for each layer already."""
    from bhlog.capture.contract.named import Bh

    return alpha if isinstance(alpha, Bh) else Bh(alpha)


def _refuse(*names: str, why: str = _NATIVE) -> None:
    """Raise InvalidOption if one of the options, which mean nothing here, was given.

    Somebody who forgets --route would get a long run of the wrong kind.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise InvalidOption(f"{option} {why}")


model_options = bundle(
    "model",
    lambda model, **values: Model(model, **values),
    click.argument("model", type=PathKind("dir", remote=True)),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the hub."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
    click.option(
        "--device-map", metavar="MAP", help="Spread it over devices: auto, balanced, sequential."
    ),
    click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16."),
    click.option("--attn", metavar="NAME", help="Attention: sdpa, eager, flash_attention_2, ..."),
    click.option(
        "--quantize",
        metavar="HOW",
        help="Quantizer of transformers, and its options: bitsandbytes_4bit, quanto:weights=int8.",
    ),
    click.option(
        "--adapter",
        type=PathKind("dir", remote=True),
        metavar="NAME",
        help="PEFT adapter to put on it: a folder, or a name on the hub.",
    ),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run code that comes with the model (unsafe)."
    ),
    click.option(
        "--tokenizer",
        type=PathKind("dir", remote=True),
        metavar="NAME",
        help="Another tokenizer: a folder, a name on the hub, or bytes.",
    ),
)
rule_options = bundle(
    "rule",
    Rule,
    click.option(
        "--route",
        default="native",
        show_default=True,
        metavar="POLICY",
        help="native observes the model's own routing; bh routes by Benjamini-Hochberg at --alpha, "
        "and bh:A, by:A, topk:K, threshold:Q, topp:P, minp:T or entropy:K by that policy.",
    ),
    click.option(
        "--alpha",
        type=ALPHA,
        metavar="A|FILE",
        default=0.05,
        show_default=True,
        help="BH level, 0 < A < 1, or a file with one for each layer.",
    ),
    click.option("--kde", type=KDE, metavar="FILE", help="Null model for bh and by."),
    click.option("--empirical", is_flag=True, help="No null model: p-values by batch rank."),
    click.option("--min-k", type=int, default=1, show_default=True, help="Fewest experts a token."),
    click.option("--max-k", type=int, help="Most experts a token (default: all)."),
    click.option(
        "--temperature", type=float, default=1.0, show_default=True, help="Of the weights."
    ),
    click.option(
        "--renormalize",
        type=click.Choice(["model", "yes", "no"]),
        default="model",
        show_default=True,
        help="Make weights sum to 1: as the model does with its own, always, never.",
    ),
    centre_option(
        "Test logits less their row's median, by a null model of such logits.", default="none"
    ),
)
pace_options = bundle(
    "pace",
    Pace,
    click.option("--batch-size", type=int, default=8, show_default=True, help="Windows a forward."),
    click.option(
        "--generate", type=int, default=0, metavar="N", help="Then generate N new tokens."
    ),
    click.option(
        "--sample-every",
        type=int,
        default=1,
        metavar="N",
        help="Log the tokens at every N-th position, at every layer.",
    ),
    click.option("--no-token-ids", is_flag=True, help="Withhold token ids from the log."),
    click.option(
        "--on-full",
        type=click.Choice(["block", "drop"]),
        default="block",
        show_default=True,
        help="When the disk is slower than the model: wait, or drop tokens and count them.",
    ),
    click.option(
        "--shard-rows",
        type=int,
        default=1 << 18,
        show_default=True,
        metavar="N",
        help="Seal a shard after N rows.",
    ),
    click.option(
        "--seal-seconds",
        type=float,
        default=30.0,
        show_default=True,
        metavar="S",
        help="Seal a shard earlier once its first row is S seconds old, or a twentieth of the "
        "run's time if that is more: what a kill can lose.",
    ),
    click.option(
        "--store-seconds",
        type=float,
        default=300.0,
        show_default=True,
        metavar="S",
        help="How long an object store that takes nothing is waited for.",
    ),
    click.option(
        "--staging",
        type=OUT_FOLDER,
        metavar="DIR",
        help="Where shards wait for an object store (default: ~/.cache/bhlog/staging).",
    ),
    click.option(
        "--allow-missing-layers",
        is_flag=True,
        help="Leave out layers whose router is not known, if others are.",
    ),
)
fit_options = bundle(
    "fit",
    Fit,
    click.option(
        "--fit-kde",
        type=OUT_FILE,
        metavar="FILE",
        help="Fit a null model from what is logged, as bhlog kde fit would from the run.",
    ),
    click.option(
        "--trim-high",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="For --fit-kde: leave out each row's N largest logits.",
    ),
    click.option(
        "--trim-low",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="For --fit-kde: leave out each row's N smallest logits.",
    ),
    click.option(
        "--null-from",
        type=click.Choice(("kept", "central")),
        default="kept",
        show_default=True,
        help="For --fit-kde: the logits that trimming keeps, or a normal curve matched to the "
        "middle half of all.",
    ),
    click.option(
        "--fit-centre",
        type=click.Choice(("none", "median")),
        default="none",
        show_default=True,
        help="For --fit-kde: of logits less their row's median; --centre median tests by it.",
    ),
)
