"""Which policy and null, chosen on one text, loses least on another: the demo, run for real.

    python -m tests.bench.held_out

Prints a JSON line per policy, null and budget. Parameters are chosen on the demo's text for
fitting, losses are of its held-out text, differences to native top-8 paired by tokens.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from bhlog.analysis.replay.held_out import kinds_of_null
from bhlog.analysis.replay.losses import loss_difference
from bhlog.analysis.replay.match import match_experts
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.run import open_log
from bhlog.capture.apps.demo import story
from bhlog.capture.checkpoint import load_model
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.rule import BhOptions, Bounds
from bhlog.capture.session import capture

BUDGETS = (3, 4, 5, 6, 7, 8)
OTHERS = ("topk", "threshold", "minp", "topp", "entropy")
MAX_K = 16


def main() -> None:
    """Run every policy at every budget."""
    loaded = load_model("demo")
    texts = [
        story._windows(documents(), loaded, tokens)
        for documents, tokens in (
            (story.training_documents, story.FIT_TOKENS),
            (story.held_out_documents, story.HELD_OUT_TOKENS),
        )
    ]
    with TemporaryDirectory() as folder:
        runs = []
        for name, windows in zip(("fit", "native"), texts, strict=True):
            capture(loaded, windows, Path(folder, name))
            runs.append(open_log(Path(folder, name)))
        fitted, native = runs
        nulls = {n: fitted.fit(o) for n, o in kinds_of_null(native.manifest.model.top_k).items()}
        tries = [(name, "", None) for name in OTHERS]
        tries += [("bh", name, kde) for name, kde in nulls.items()]
        tries += [("lfdr", "central", nulls["central"])]
        for number, (name, null, kde) in enumerate(tries):
            for budget in BUDGETS:
                wanted = [parse_policy(name, open_value=True)]
                (policy,) = match_experts(
                    fitted, wanted, budget, kde=kde, bounds=Bounds(max_k=MAX_K)
                )
                run = Path(folder, f"{number}-{budget}")
                centre = "none" if kde is None else kde.centre
                options = BhOptions.of(str(policy), max_k=MAX_K, centre=centre)
                capture(loaded, texts[1], run, routing=Routing.by(options), kde=kde)
                rerun = open_log(run)
                gap = loss_difference(rerun, native)
                found = {
                    "policy": str(policy),
                    "null": null,
                    "budget": budget,
                    "experts": round(story.mean_experts(rerun), 3),
                    "to_native": round(gap.mean, 4),
                    "se": round(gap.se, 4),
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
