"""Wanted: the run that an export is of, and what it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass

from bhlog.analysis.fold import WHOLE, Scope
from bhlog.analysis.log import Log
from bhlog.analysis.nulls import routed_empirically
from bhlog.analysis.replay.comparison import replay
from bhlog.analysis.replay.settings import bounds_of, settings_of
from bhlog.analysis.sweep.profile import Profile
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import OPEN, Bounds


@dataclass(frozen=True, eq=False)
class Wanted:
    """A run, and the decisions or the budget that an export is of.

    Attributes:
        log: the run.
        alpha: BH level that decides, or a policy with one for each layer.
        experts: mean experts a token.
        profile: what knows the alpha of a number of experts without another pass over the log.
        kde: null model; None is the run's own.
        bounds: of the decisions; where open, as in the run.
        scope: which rows count.

    Raises:
        InvalidOption: both alpha and experts, or a profile of another model.
    """

    log: Log
    alpha: float | Bh | None = None
    experts: float | None = None
    profile: Profile | None = None
    kde: KdeModel | None = None
    bounds: Bounds = OPEN
    scope: Scope = WHOLE

    def __post_init__(self) -> None:
        if self.alpha is not None and self.experts is not None:
            raise InvalidOption("give --alpha or --experts, not both: each says how many experts")
        if self.experts is not None and not 0 < self.experts <= self.log.n_experts:
            raise InvalidOption(
                f"--experts must be above 0 and at most {self.log.n_experts}, got {self.experts:g}"
            )
        if self.profile is not None:
            theirs = self.profile.n_experts, self.profile.layers
            if theirs != (self.log.n_experts, self.log.layers):
                raise InvalidOption(
                    f"the profile is of {theirs[0]} experts in {len(theirs[1])} layers, "
                    f"{self.log.path} of {self.log.n_experts} in {len(self.log.layers)}: give one "
                    "that bhlog sweep RUN --save made of this model"
                )

    def decided(self) -> float | Bh | None:
        """The alpha that decides: the one given, or that of a number of experts; None: as logged.

        Raises:
            InvalidOption: no alpha gives so many experts.
            KdeMismatch: there is no null model.
        """
        if self.alpha is None and self.experts is None:
            return None
        self.log.require_logits()
        if self.experts is None:
            return self.alpha
        profile, limits = self._known(), self._limits()
        floor = profile.floor(**limits)
        if floor > self.experts:
            raise InvalidOption(
                f"--experts {self.experts:g}: no alpha comes down to it; at {profile.alphas[0]:g}, "
                f"the smallest, {floor:.4g} experts remain: min_k and logits beyond the null "
                "model's support (p = 0 at any alpha) set a floor; give --max-k or another null"
            )
        return profile.alpha_for(self.experts, **limits)

    def budget(self) -> float:
        """Mean experts a token: the number given, what the alpha gives, or the model's own top-k.

        Raises:
            InvalidOption, KdeMismatch: as of a replay.
        """
        if self.experts is not None:
            return self.experts
        if self.alpha is None:
            return float(self.log.manifest.model.top_k)
        if self.profile is not None:
            by_layer = dict(self.alpha.by_layer) if isinstance(self.alpha, Bh) else self.alpha
            return self.profile.mean_experts(by_layer, **self._limits())
        settings = settings_of(self.log, [self.alpha], bounds=self.bounds)
        frame = replay(self.log, settings, kde=self.kde, scope=self.scope)
        return float(frame["mean_experts"][-1])

    @property
    def decoder_layers(self) -> int:
        """Layers up to the last that has a router: lists of engines have a place for each."""
        return max(self.log.layers) + 1

    def _limits(self) -> dict[str, int | None]:
        bounds = bounds_of(self.log, self.bounds)
        return {"min_k": bounds.min_k, "max_k": bounds.max_k}

    def _known(self) -> Profile:
        if self.profile is not None:
            return self.profile
        if self.kde is None and routed_empirically(self.log):
            raise InvalidOption(f"{self.log.path}: has empirical p-values: name a null, --kde FILE")
        return profile_log(self.log, self.kde, scope=self.scope)


Export = Callable[[Wanted], bytes]  # the contents of the file
