"""Policies at the same mean experts: which of them loses least when the model runs by it?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from bhlog.analysis.replay.losses import Mean, loss_difference, loss_of
from bhlog.analysis.replay.match import match_experts
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.run import Run, open_log
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions, Bounds

BUDGETS = (4, 6)
MAX_K = 16
FAMILIES = ("bh", "topk", "threshold", "topp", "minp")


def run_name(family: str, budget: int) -> str:
    """The folder of a rerun."""
    return f"{family}-at-{budget}"


class Rerun(NamedTuple):
    """A policy at a budget: what it was asked for, what replay predicts, and its run."""

    budget: int
    policy: Policy
    kept: float
    run: Run


def reruns(
    native: Run, kde: KdeModel, out: Path, run_by: Callable[[Path, Routing, KdeModel | None], None]
) -> list[Rerun]:
    """Run every family at every budget: parameters by the native log, no more than max_k experts.

    Args:
        out: folder of the runs.
        run_by: runs the same text into a folder.
    """
    found = []
    for budget in BUDGETS:
        wanted = [parse_policy(name, open_value=True) for name in FAMILIES]
        policies = match_experts(native, wanted, budget, kde=kde, bounds=Bounds(max_k=MAX_K))
        table = native.compare(policies, kde=kde, max_k=MAX_K).filter(pl.col("layer").is_null())
        for policy, kept in zip(policies, table["probability_kept"], strict=True):
            folder = out / run_name(policy.name, budget)
            options = BhOptions.of(str(policy), max_k=MAX_K)
            run_by(folder, Routing.by(options), kde if policy.tests else None)
            found.append(Rerun(budget, policy, kept, open_log(folder)))
    return found


def told(native: Run, found: Sequence[Rerun]) -> tuple[pl.DataFrame, list[str]]:
    """A row per rerun with its loss and what it loses to native, and who wins, in sentences."""
    rows, words = [], []
    for budget in dict.fromkeys(one.budget for one in found):
        mine = [one for one in found if one.budget == budget]
        losses = {one.policy.name: loss_of(one.run) for one in mine}
        for one in mine:
            gap = loss_difference(one.run, native)
            rows.append(
                {
                    "budget": budget,
                    "policy": str(one.policy),
                    "experts": mean_experts(one.run),
                    "loss": losses[one.policy.name].mean,
                    "loss_se": losses[one.policy.name].se,
                    "to native": gap.mean,
                    "to native_se": gap.se,
                    "probability kept": one.kept,
                }
            )
        by_name = {one.policy.name: one for one in mine}
        bh, topk = by_name.pop("bh"), by_name.pop("topk")
        best = min(by_name.values(), key=lambda one: losses[one.policy.name].mean)
        words.append(
            f"At {budget} experts {_against(bh, topk)}; {_against(bh, best)} (the best of "
            f"{len(by_name)} others)."
        )
    words.append(_ranked(pl.DataFrame(rows)))
    return pl.DataFrame(rows), words


def mean_experts(log: Run) -> float:
    """Experts per token that a run used, over all layers."""
    counts = [values_of(batch.column("n_selected")) for batch in log.batches(["n_selected"])]
    return float(sum(n.sum() for n in counts) / sum(len(n) for n in counts))


def _against(bh: Rerun, other: Rerun) -> str:
    """Which of two loses less, if that can be told: by two standard errors."""
    gap: Mean = loss_difference(bh.run, other.run)
    size = f"{abs(gap.mean):.4f} nats, se {gap.se:.4f}"
    if not abs(gap.mean) > 2 * gap.se:
        return f"BH and {other.policy} lose the same as far as this text can tell ({size})"
    wins, loses = ("BH", other.policy) if gap.mean < 0 else (other.policy, "BH")
    return f"{wins} wins over {loses} by {size}"


def _ranked(table: pl.DataFrame) -> str:
    """How well probability kept, as replay predicts it, ranks the reruns of each budget by loss."""
    ordered = total = 0
    for _, part in table.group_by("budget"):
        kept, loss = part["probability kept"].to_numpy(), part["loss"].to_numpy()
        more = kept[:, None] > kept
        total += int(more.sum())
        ordered += int((more & (loss[:, None] < loss)).sum())
    rho = np.corrcoef(table["probability kept"].rank().to_numpy(), table["loss"].rank().to_numpy())[
        0, 1
    ]
    return (
        f"Probability kept, replayed, ranks all {table.height} reruns by loss with Spearman's rho "
        f"{rho:.2f}; at the same budget {ordered} of {total} pairs are as it says."
    )
