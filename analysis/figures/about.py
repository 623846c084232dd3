"""What a figure is of, in words: the run, the model, the null model and the settings in a title."""

from collections.abc import Sequence
from pathlib import PurePath
from textwrap import wrap

from bhlog.analysis.log import Log
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions

LONGEST = 40  # characters of a name


def run_words(log: Log) -> tuple[str, ...]:
    """The run and its model."""
    return f"run {short(log.name)}", f"model {_model_name(log.manifest.model.name)}"


def logged_words(log: Log) -> tuple[str, ...]:
    """The run, its model, and how it was routed."""
    routing = log.manifest.routing
    if routing.options is None:
        top_k = log.manifest.model.top_k
        return *run_words(log), f"native top-{top_k}: no null model, no alpha"
    empirical = routing.options.p_values == "empirical"
    if not routing.options.named.tests:
        return *run_words(log), *setting_words(routing.options, log.n_experts)
    null = "empirical p-values" if empirical else null_words(log.kde, "the run's own")
    return *run_words(log), null, *setting_words(routing.options, log.n_experts)


def setting_words(options: BhOptions, n_experts: int) -> tuple[str, ...]:
    """alpha or the policy, and bounds."""
    rule = f"alpha {options.alpha:g}" if options.policy is None else options.policy
    return rule, bound_words(*options.bounds(n_experts), n_experts)


def bound_words(min_k: int, max_k: int, n_experts: int) -> str:
    """Bounds on experts; a max_k of all experts is none."""
    return f"min_k {min_k}, " + ("no max_k" if max_k >= n_experts else f"max_k {max_k}")


def null_words(kde: KdeModel | None, name: str) -> str:
    """A null model by its name and trimming."""
    if kde is None:
        return f"null {short(name)}"
    trims = {curve.trim for _, curve in kde.curves}
    trimmed = next(iter(trims)) if len(trims) == 1 else None
    notes = [] if kde.pooled else ["by expert"]
    if trimmed is not None:
        notes.append(f"trim {trimmed.low}:{trimmed.high}")
    return f"null {short(name)}" + (f" ({'; '.join(notes)})" if notes else "")


def short(name: str, most: int = LONGEST) -> str:
    """A name that fits in a title or a legend: the end of a path tells more than its start."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def title_lines(title: str, about: Sequence[str], most: int) -> str:
    """The title, and below it what it is about, in lines of at most so many characters."""
    lines = wrap(title, most)
    line = ""
    for part in about:
        if line and len(line) + 3 + len(part) > most:
            lines.append(line)
            line = ""
        line = f"{line} · {part}" if line else part
    return "\n".join(piece for whole in (*lines, line) for piece in wrap(whole, most))


def _model_name(name: str) -> str:
    """A hub name as it is, of a folder the last part."""
    return short(PurePath(name).name if PurePath(name).is_absolute() else name)
