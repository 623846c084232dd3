"""The null models of opened runs, by run."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.log import Log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.model import KdeModel


class Nulls:
    """The null models that functions take p-values from, read when first needed.

    Attributes:
        runs: the open runs by name.
        given: one null model in place of the runs' own, or None.
    """

    def __init__(self, runs: Mapping[str, Log], given: KdeModel | None = None) -> None:
        self.runs = runs
        self.given = given
        self._thresholds: dict[tuple[Any, ...], NDArray[np.float32]] = {}

    def of(self, run: str | None) -> KdeModel:
        """The null model of a run, or for None the one that all open runs share.

        Raises:
            KdeMismatch: there is none, or the runs have different ones.
        """
        if self.given is not None:
            return self.given
        if run is None:
            return self._shared
        kde = self.runs[run].kde if run in self.runs else None
        if kde is None:
            raise KdeMismatch(
                f"run '{run}' has no null model; fit one with bhlog kde fit RUN --out FILE and "
                "give it with --kde FILE"
                if run in self.runs
                else f"no run '{run}' is open; runs: {', '.join(self.runs)}"
            )
        return kde

    def bounds(self, run: str | None) -> tuple[int, int | None]:
        """(min_k, max_k) of a run, or for None those that all open runs share; (1, None) if native.

        Raises:
            InvalidOption: there is no such run, or the runs have different ones.
        """
        if run is not None and run not in self.runs:
            raise InvalidOption(f"no run '{run}' is open; runs: {', '.join(self.runs)}")
        logs = self.runs.values() if run is None else [self.runs[run]]
        options = [log.manifest.routing.options for log in logs]
        bounds = {(o.min_k, o.max_k) if o else (1, None) for o in options} or {(1, None)}
        if len(bounds) > 1:
            raise InvalidOption(
                "the open runs have different bounds: name the run, as in "
                "bh_count(logits, layer, 0.05, run := run), or give min_k and max_k"
            )
        return bounds.pop()

    def has(self, run: str) -> bool:
        """Whether there is a null model for a run."""
        return self.given is not None or (run in self.runs and self.runs[run].kde is not None)

    def thresholds(
        self, run: str | None, layer: int, alpha: float, n_experts: int
    ) -> NDArray[np.float32]:
        """Thresholds of a layer at alpha, kept; see LayerNull.thresholds.

        Raises:
            KdeMismatch: no null model for that layer and number of experts.
        """
        key = (run, layer, alpha, n_experts)
        if key not in self._thresholds:
            kde = self.of(run)
            kde.require((layer,), n_experts)
            self._thresholds[key] = kde[layer].thresholds(alpha, n_experts)
        return self._thresholds[key]

    @cached_property
    def _shared(self) -> KdeModel:
        models = {log.kde.sha256: log.kde for log in self.runs.values() if log.kde is not None}
        if len(models) == 1:
            return next(iter(models.values()))
        raise KdeMismatch(
            "the open runs have different null models: name the run, as in "
            "bh_count(logits, layer, 0.05, run := run)"
            if models
            else "no open run has a null model; fit one with bhlog kde fit RUN --out FILE and give "
            "it with --kde FILE"
        )
