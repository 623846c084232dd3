"""Profile: experts at every alpha of a grid, from one pass over a log.

The critical alpha of rank k is the smallest alpha at which a row selects at least k experts. The
profile counts rows by rank and critical alpha, so the share of rows with n_rejected >= k is known
at every alpha of the grid, exactly as replay would count it, and with it the mean number of experts
under any bounds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bhlog.analysis.report.markup import small_table, text
from bhlog.analysis.sweep import profile_file
from bhlog.analysis.sweep.budget import share_budget
from bhlog.analysis.sweep.by_rank import check_counts, mean_and_error, sum_of
from bhlog.analysis.sweep.critical import ONE
from bhlog.analysis.sweep.grid import rising
from bhlog.capture.contract.errors import CorruptProfile, InvalidOption
from bhlog.capture.contract.rule import OPEN, Bounds


@dataclass(frozen=True, eq=False)
class Profile:
    """Counts of rows by layer, rank and critical alpha.

    Attributes:
        alphas: (J,) float64, rising inside (0, 1).
        counts: by layer, rising, (E, J + 1) int64: rows whose rank k (index k - 1) becomes selected
            at alphas[j]; the last column counts rows in which it never does.
        kept: by layer, (E, J + 1) int64: the router probability of rank k summed over the rows of
            each count, in units of 1 / ONE; None if it was not asked for.
        source: ids of the runs that were counted.
        kde_sha256: of the null model, as in run.json.
        where: the condition that the counted rows match; None for all rows.
        bounds: of the runs, which apply where a question leaves min_k or max_k out; open ones are 1
            and all experts. None: they differ between the runs, and every question must give both.
        noise: counts like these of a sample with each expert's logits shuffled over tokens, see
            bhlog.analysis.noise; None in profiles that are older.
    """

    alphas: NDArray[np.float64]
    counts: dict[int, NDArray[np.int64]]
    source: tuple[str, ...]
    kde_sha256: str
    where: str | None = None
    kept: dict[int, NDArray[np.int64]] | None = None
    bounds: Bounds | None = OPEN
    noise: dict[int, NDArray[np.int64]] | None = None

    def __post_init__(self) -> None:
        J = len(self.alphas)
        if not rising(self.alphas):
            raise CorruptProfile("alphas must rise inside (0, 1)")
        if not self.counts:
            raise CorruptProfile("a profile needs at least one layer")
        if self.bounds is not None:
            self.bounds.resolve(self.n_experts)  # checks them
        check_counts(self.counts, (self.n_experts, J + 1), self.kept, self.noise)

    def __repr__(self) -> str:
        layers = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        alphas = f"{len(self.alphas):,} alphas from {self.alphas[0]:g} to {self.alphas[-1]:g}"
        rows = f"{sum(map(self.rows, self.layers)):,} rows"
        return f"Profile({layers} of {self.n_experts} experts, {alphas}, {rows})"

    def _repr_html_(self) -> str:
        if self.bounds is None:
            return f"<code>{text(repr(self))}</code>"
        asked = [0.001, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 10))]
        inside = [alpha for alpha in asked if self.alphas[0] <= alpha <= self.alphas[-1]]
        frame = self.frame(inside or self.alphas[:1].tolist())
        if len(self.layers) > 12:
            frame = frame.select("alpha", "overall")
        return small_table(frame, f"Mean experts a token: {self!r}")

    @property
    def n_experts(self) -> int:
        """Experts per router."""
        return len(next(iter(self.counts.values())))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that were counted, rising."""
        return tuple(self.counts)

    def rows(self, layer: int) -> int:
        """Rows of a layer that were counted: those with a finite logit."""
        return int(self.counts[layer][0].sum())

    def mean_experts(
        self,
        alpha: float | Mapping[int, float],
        *,
        min_k: int | None = None,
        max_k: int | None = None,
        layer: int | None = None,
    ) -> float:
        """Mean n_selected at an alpha, of one layer or over all (None).

        Exact at the alphas of the grid; between two of them, the value at the lower one.

        Args:
            alpha: one for all layers, or by layer, as alphas_for gives them.
            min_k, max_k: bounds; None is as in the runs, see `bounds`. n_experts for max_k is none.

        Raises:
            InvalidOption: alpha is below the grid, there is no such layer, bounds are wrong, or
                they differ between the runs and are not given.
        """
        if not isinstance(alpha, Mapping):
            return float(self.curve(min_k=min_k, max_k=max_k, layer=layer)[self._place(alpha)])
        wanted = self.layers if layer is None else (layer,)
        rows = [self.rows(i) for i in wanted]
        means = [self.mean_experts(alpha[i], min_k=min_k, max_k=max_k, layer=i) for i in wanted]
        return float(np.average(means, weights=rows))

    def probability_kept(
        self,
        alpha: float | Mapping[int, float],
        *,
        min_k: int | None = None,
        max_k: int | None = None,
        layer: int | None = None,
    ) -> float:
        """Mean softmax probability of the selected experts; arguments as of mean_experts.

        Raises:
            InvalidOption: as mean_experts, or the profile did not count it.
        """
        wanted = self.layers if layer is None else (layer,)
        values = [
            self._kept_curve(min_k, max_k, i)[
                self._place(alpha[i] if isinstance(alpha, Mapping) else alpha)
            ]
            for i in wanted
        ]
        return float(np.average(values, weights=[self.rows(i) for i in wanted]))

    def noise_experts(
        self,
        alpha: float | Mapping[int, float],
        *,
        min_k: int | None = None,
        max_k: int | None = None,
        layer: int | None = None,
    ) -> tuple[float, float] | None:
        """Mean experts of shuffled logits and its standard error; None in an older profile.

        Layers are weighted by their rows. Arguments and errors are those of mean_experts.
        """
        if self.noise is None:
            return None
        wanted = self.layers if layer is None else (layer,)
        share = np.array([self.rows(i) for i in wanted]) / max(1, sum(map(self.rows, wanted)))
        at = {i: self._place(alpha[i] if isinstance(alpha, Mapping) else alpha) for i in wanted}
        bounds = self._checked(min_k, max_k, layer)
        found = [mean_and_error(self.noise[i], at[i], *bounds) for i in wanted]
        means, errors = np.array(found).T
        return float(share @ means), float(np.sqrt(share**2 @ errors**2))

    def floor(
        self, *, min_k: int | None = None, max_k: int | None = None, layer: int | None = None
    ) -> float:
        """Mean n_selected at the smallest alpha: no alpha of the grid gives fewer.

        Logits beyond the support of the null model have p = 0, which BH rejects at any alpha, so
        that a null fitted from trimmed rows has a floor under the number of experts. Arguments as
        of mean_experts.

        Raises:
            InvalidOption: as mean_experts.
        """
        return float(self.curve(min_k=min_k, max_k=max_k, layer=layer)[0])

    def alpha_for(
        self,
        mean_experts: float,
        *,
        min_k: int | None = None,
        max_k: int | None = None,
        layer: int | None = None,
    ) -> float:
        """The smallest alpha of the grid that gives at least this many experts per token.

        It may give more: see floor.

        Raises:
            InvalidOption: no alpha of the grid reaches it.
        """
        curve = self.curve(min_k=min_k, max_k=max_k, layer=layer)
        self._require_reached(mean_experts, curve, "" if layer is None else f"layer {layer}: ")
        return float(self.alphas[np.searchsorted(curve, mean_experts, side="left")])

    def alphas_for(
        self, mean_experts: float, *, min_k: int | None = None, max_k: int | None = None
    ) -> dict[int, float]:
        """An alpha for each layer: together they give at least this many experts per token.

        The budget counts over all layers, and goes where experts keep most of the router's
        probability: maximised is the mean of probability_kept, so the last expert keeps as much in
        every layer; see bhlog.analysis.sweep.budget.

        Raises:
            InvalidOption: no alphas of the grid reach it, or the profile did not count the
                probability kept.
        """
        self._require_reached(mean_experts, self.curve(min_k=min_k, max_k=max_k))
        curves = [self.curve(min_k=min_k, max_k=max_k, layer=i) for i in self.layers]
        rows = np.array([self.rows(i) for i in self.layers])
        kept = [self._kept_curve(min_k, max_k, i) for i in self.layers]
        places = share_budget(
            np.stack(curves), np.stack(kept), rows / max(1, rows.sum()), mean_experts
        )
        return dict(zip(self.layers, self.alphas[places].tolist(), strict=True))

    def frame(
        self, alphas: Sequence[float], *, min_k: int | None = None, max_k: int | None = None
    ) -> pl.DataFrame:
        """A row per alpha: mean experts of every layer (layer_0, ...) and over all (overall).

        Last the noise over all layers, see noise_experts; null in an older profile.
        """
        places = [self._place(alpha) for alpha in alphas]
        columns = {
            "overall" if layer is None else f"layer_{layer}": self.curve(
                min_k=min_k, max_k=max_k, layer=layer
            )[places]
            for layer in (*self.layers, None)
        }
        noise = [self.noise_experts(alpha, min_k=min_k, max_k=max_k) for alpha in alphas]
        means = pl.Series(
            [None if found is None else found[0] for found in noise], dtype=pl.Float64
        )
        given = {"alpha": pl.Series(alphas, dtype=pl.Float64)}
        return pl.DataFrame({**given, **columns, "noise": means})

    def curve(
        self, *, min_k: int | None = None, max_k: int | None = None, layer: int | None = None
    ) -> NDArray[np.float64]:
        """(J,) mean n_selected at each alpha of the grid, of one layer or over all (None).

        Raises:
            InvalidOption: there is no such layer, or bounds are wrong.
        """
        low, high = self._checked(min_k, max_k, layer)
        selected, rows = self._selected[layer]
        return np.asarray(low + (selected[high] - selected[low]) / max(1, rows))

    def _kept_curve(self, min_k: int | None, max_k: int | None, layer: int) -> NDArray[np.float64]:
        """(J,) mean probability kept at each alpha of the grid."""
        if self.kept is None:
            raise InvalidOption(
                "this profile did not count the probability that experts keep; make it anew: "
                "run.sweep(kept=True) or bhlog sweep RUN --kept"
            )
        low, high = self._checked(min_k, max_k, layer)
        by_rank = self.kept[layer]
        always = by_rank[:low].sum()
        reached = np.cumsum(by_rank[low:high, :-1].sum(axis=0))
        return np.asarray((always + reached) / (ONE * max(1, self.rows(layer))))

    def _checked(self, min_k: int | None, max_k: int | None, layer: int | None) -> tuple[int, int]:
        """The bounds in force; InvalidOption if one is wrong or there is no such layer."""
        E = self.n_experts
        low, high = (1, E) if self.bounds is None else self.bounds.resolve(E)
        if self.bounds is None and (min_k is None or max_k is None):
            raise InvalidOption(
                "the runs of this profile have different bounds: give both, --min-k and --max-k "
                "(min_k= and max_k= in Python)"
            )
        low, high = low if min_k is None else min_k, high if max_k is None else max_k
        if not 0 <= low <= high <= E or high < 1:
            raise InvalidOption(f"bounds must be 0 <= min_k <= max_k <= {E}, got {low}, {high}")
        if layer is not None and layer not in self.counts:
            raise InvalidOption(
                f"no layer {layer} in the profile; it has {', '.join(map(str, self.layers))}"
            )
        return low, high

    @cached_property
    def _selected(self) -> dict[int | None, tuple[NDArray[np.int64], int]]:
        """By layer and over all (None): (E + 1, J) sums of min(n_rejected, k), and rows."""
        found: dict[int | None, tuple[NDArray[np.int64], int]] = {}
        total = np.zeros((self.n_experts + 1, len(self.alphas)), dtype=np.int64)
        for layer, counts in self.counts.items():
            selected = np.zeros_like(total)
            np.cumsum(np.cumsum(counts[:, :-1], axis=1), axis=0, out=selected[1:])
            found[layer] = selected, self.rows(layer)
            total += selected
        found[None] = total, sum(rows for _, rows in found.values())
        return found

    def merge(self, other: "Profile") -> "Profile":
        """The profile of the rows of both; it keeps probabilities if both do, and bounds if they
        are the same.

        Raises:
            InvalidOption: their grids, experts, null models or conditions differ, or both count the
                same layers of the same run.
        """
        if not np.array_equal(self.alphas, other.alphas) or self.n_experts != other.n_experts:
            raise InvalidOption("profiles with other alphas or experts cannot be merged")
        if self.kde_sha256 != other.kde_sha256:
            raise InvalidOption(
                f"profiles under different null models cannot be merged: {self.kde_sha256[:12]} "
                f"and {other.kde_sha256[:12]}; sweep both runs with the same --kde FILE"
            )
        if self.where != other.where:
            raise InvalidOption(
                f"profiles of rows where {self.where or 'true'} and where {other.where or 'true'} "
                "cannot be merged"
            )
        twice = sorted({*self.source} & {*other.source})
        if twice and {*self.counts} & {*other.counts}:
            raise InvalidOption(f"run {twice[0]} is in both profiles: its rows would count twice")
        kept = noise = None
        if self.kept is not None and other.kept is not None:
            kept = sum_of(self.kept, other.kept)
        if self.noise is not None and other.noise is not None:
            noise = sum_of(self.noise, other.noise)
        return Profile(
            self.alphas,
            sum_of(self.counts, other.counts),
            tuple(sorted({*self.source, *other.source})),
            self.kde_sha256,
            self.where,
            kept,
            self.bounds if self._same_bounds(other) else None,
            noise,
        )

    def _same_bounds(self, other: "Profile") -> bool:
        if self.bounds is None or other.bounds is None:
            return False
        return self.bounds.resolve(self.n_experts) == other.bounds.resolve(self.n_experts)

    def save(self, path: str | Path) -> None:
        """Write the profile as Parquet, whole or not at all; see bhlog.analysis.sweep.profile_file.

        Raises:
            InvalidOption: the file cannot be written there.
        """
        facts = profile_file.Facts(
            self.n_experts, self.alphas, self.source, self.kde_sha256, self.where, self.bounds
        )
        profile_file.write(path, facts, self.counts, self.kept, self.noise)

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read a profile.

        Raises:
            CorruptProfile: it is not there, not a profile, or breaks an invariant.
        """
        facts, counts, kept, noise, rows = profile_file.read(path)
        try:
            profile = cls(
                facts.alphas,
                counts,
                facts.source,
                facts.kde_sha256,
                facts.where,
                kept,
                facts.bounds,
                noise,
            )
            for layer, n in rows.items():
                if n != profile.rows(layer):
                    raise CorruptProfile(
                        f"layer {layer}: counts {profile.rows(layer)} rows, but says rows = {n}"
                    )
        except (CorruptProfile, InvalidOption) as error:
            raise CorruptProfile(f"{path}: {error}") from error
        profile._selected  # noqa: B018 - sums up now what every answer needs
        return profile

    def _place(self, alpha: float) -> int:
        """The last alpha of the grid up to this one."""
        if not self.alphas[0] <= alpha < 1:
            raise InvalidOption(
                f"alpha must be at least {self.alphas[0]:g}, the profile's smallest, and below 1; "
                f"got {alpha:g}"
            )
        return int(np.searchsorted(self.alphas, alpha, side="right")) - 1

    def _require_reached(
        self, mean_experts: float, curve: NDArray[np.float64], where: str = ""
    ) -> None:
        if not mean_experts <= curve[-1]:  # NaN fails too
            raise InvalidOption(
                f"{where}no alpha up to {self.alphas[-1]:g} gives {mean_experts:g} experts per "
                f"token, at most {curve[-1]:.4g} within these bounds"
            )
