"""Held out: policies and null models whose parameters one run chose, on another run."""

from collections.abc import Sequence

import polars as pl

from bhlog.analysis.fold import WHOLE, Scope
from bhlog.analysis.log import Log
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.match import match_experts
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.replay.settings import bounds_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import OPEN, Bounds


def kinds_of_null(top_k: int) -> dict[str, FitOptions]:
    """Fits of a null model that are tried, by name: of all logits, without each row's top_k,
    matched to their centre, or less their row's median."""
    return {
        "whole": FitOptions(),
        "trimmed": FitOptions(trim_high=top_k),
        "central": FitOptions(null_from="central"),
        "centred": FitOptions(trim_high=top_k, centre="median"),
        "by expert": FitOptions(trim_high=top_k, null="expert"),
    }


def held_out(
    fitted: Log,
    tested: Log,
    policies: Sequence[str],
    experts: float,
    *,
    bounds: Bounds = OPEN,
    scope: Scope = WHOLE,
) -> pl.DataFrame:
    """Bring policies to a budget on one run, under each kind of null, and report on another.

    Args:
        fitted: what null models are fitted from, and parameters chosen on.
        tested: of the same model, another text.
        policies: their texts; values may be left out.
        experts: mean experts a token.
        bounds: of policies that have none of their own; where open, as in `fitted`.
        scope: which rows of both.

    Returns:
        A row per policy, and per null of those that test p-values, by falling probability_kept:
        policy, null (null where nothing is tested), fitted_experts (mean over `fitted`), and over
        `tested` the columns of bhlog.analysis.replay.summary.

    Raises:
        InvalidOption: both are one run, or of models of other shape; or see compare.
    """
    if fitted.manifest.run_id == tested.manifest.run_id:
        raise InvalidOption(f"{fitted.path} and {tested.path} are one run: test on another text")
    if fitted.layers != tested.layers or fitted.n_experts != tested.n_experts:
        raise InvalidOption(f"{fitted.path} and {tested.path} come from models of other shape")
    bounds = bounds_of(fitted, bounds)
    wanted = [parse_policy(text, open_value=True) for text in policies]
    top_k = fitted.manifest.model.top_k
    groups: list[tuple[str | None, KdeModel | None, list[Policy]]] = [
        (None, None, [policy for policy in wanted if not policy.tests])
    ]
    testing = [policy for policy in wanted if policy.tests]
    for kind, options in kinds_of_null(top_k).items() if testing else ():
        suited = [p for p in testing if options.null_from == "central" or p.name != "lfdr"]
        if suited:
            groups.append((kind, fit_kde([fitted], options, scope=scope), suited))
    frames = []
    for name, kde, group in groups:
        if not group:
            continue
        matched = match_experts(fitted, group, experts, kde=kde, bounds=bounds, scope=scope)
        here, there = (
            compare(log, matched, kde=kde, bounds=bounds, scope=scope).filter(
                pl.col("layer").is_null()
            )
            for log in (fitted, tested)
        )
        frames.append(
            there.drop("layer").select(
                "policy",
                pl.lit(name, pl.String).alias("null"),
                here["mean_experts"].alias("fitted_experts"),
                pl.exclude("policy"),
            )
        )
    return pl.concat(frames).sort("probability_kept", descending=True, maintain_order=True)
