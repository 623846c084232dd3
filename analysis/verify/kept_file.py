"""Verification of what is kept beside runs: a null model or a profile, in a file of its own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bhlog.analysis.sweep.profile import Profile
from bhlog.analysis.verify.verification import Finding
from bhlog.capture.contract.checksum import has_checksum, read_bytes
from bhlog.capture.contract.errors import CorruptKde, CorruptProfile
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.fit import refit
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.uris import shown, suffix_of

_PROFILE = b"bhlog.profile_schema_version"
_END = 1 << 20  # bytes of a file in which the names of its metadata stand
TOLERANCE = 1e-3  # relative, of tails down to 1e-8: what other versions of the fit may differ by


def is_kept_file(path: str | Path) -> bool:
    """Whether a path or URI is of a Parquet file, which may be a null model or a profile."""
    if "://" in str(path):
        return suffix_of(path) == ".parquet"
    try:
        if not Path(path).is_file():  # a FIFO would wait for ever
            return False
        with Path(path).open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def verify_file(path: str | Path) -> list[Finding]:
    """Check a null model or a profile: its checksum, and what can be computed again.

    The tails of a null model are fitted again from the histograms that it keeps. A profile's counts
    cannot be: its log has them.
    """
    try:
        data = read_bytes(path)
    except OSError:  # loading says why
        data = b""
    findings = [*(_profile(path) if _PROFILE in data[-_END:] else _null_model(path))]
    if all(finding.status == "ok" for finding in findings) and not has_checksum(data):
        detail = "of version 1, which had no checksum: that its numbers are as written is not known"
        findings.append(Finding("files", "warning", shown(str(path)), detail))
    return findings


def _profile(path: str | Path) -> Iterator[Finding]:
    try:
        found = Profile.load(path)
    except CorruptProfile as error:
        yield Finding("profile", "error", shown(str(path)), str(error))
        return
    rows = max(int(of_layer[0].sum()) for of_layer in found.counts.values())
    detail = f"{len(found.layers)} layers, {rows:,} rows a layer, {len(found.alphas):,} alphas"
    yield Finding("profile", "ok", shown(str(path)), detail)


def _null_model(path: str | Path) -> Iterator[Finding]:
    try:
        model = KdeModel.load(path)
    except CorruptKde as error:
        yield Finding("null model", "error", shown(str(path)), str(error))
        return
    detail = f"{len(model)} layers, {len(model.curves)} curves, sha256 {model.sha256[:12]}..."
    yield Finding("null model", "ok", shown(str(path)), detail)
    if any(curve.histogram is None for _, curve in model.curves):
        detail = "imported: its tails have no histogram that they could be fitted from again"
        yield Finding("null model", "warning", shown(str(path)), detail)
        return
    again = refit(model)
    for layer, curve in model.curves:
        fitted = again[layer].curves[curve.expert or 0]
        apart = _apart(curve, fitted)
        if apart > TOLERANCE:
            who = f"layer {layer}" + ("" if curve.expert is None else f", expert {curve.expert}")
            detail = f"{who}: its tail is off that of its histogram by {apart:.2g} of it"
            yield Finding("null model", "error", shown(str(path)), detail)


def _apart(curve: NullCurve, fitted: NullCurve) -> float:
    """The largest relative difference of two tails on the first one's grid, down to 1e-8."""
    tail = np.maximum(fitted.p_value(curve.grid), 1e-8)
    return float(np.max(np.abs(np.maximum(curve.tail, 1e-8) / tail - 1)))
