"""Which null model: one that is named, in any form, or a run's own. Decided here, and only here."""

from pathlib import Path

from bhlog.analysis.log import Log
from bhlog.analysis.storage import filesystem
from bhlog.capture.contract.errors import KdeMismatch
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.pickles import load_kde_models
from bhlog.capture.contract.store import reached
from bhlog.capture.contract.uris import shown

Named = KdeModel | Log | str | Path  # what a null model can be named by


def load_null(named: Named) -> KdeModel:
    """The null model that is named.

    Args:
        named: a model; a run that has one of its own, or its path or URI; the path or URI of a null
            model file; a folder of pickles of an older project.

    Raises:
        CorruptKde, UnsafePickle: there is none, or it cannot be read.
        KdeMismatch: the run has none.
        MissingRun: the URI is not there or cannot be reached.
    """
    if isinstance(named, KdeModel):
        return named
    if isinstance(named, Log):
        return _own(named)
    path = str(named)
    if "://" in path:
        return _remote(path)
    own = Path(path) / "kde.parquet"
    return load_kde_models(own if own.is_file() else path)


def null_named(named: Named | None) -> KdeModel | None:
    """The null model that is named, if one is; see load_null."""
    return None if named is None else load_null(named)


def null_model(log: Log, named: Named | None = None) -> KdeModel:
    """The null model that is named, or for None the run's own, checked against the run.

    Raises:
        KdeMismatch: there is none, or it is for other layers or experts.
    """
    model = _own(log) if named is None else load_null(named)
    model.require(log.layers, log.n_experts)
    return model


def null_or_empirical(log: Log, named: Named | None = None) -> KdeModel | None:
    """The same for jobs that can also take the p-values that a run was routed by.

    Returns:
        None for empirical p-values, which rank whole forwards: those of a run that was routed by
        them, unless a null model is named.
    """
    return None if named is None and routed_empirically(log) else null_model(log, named)


def has_p_values(log: Log, named: Named | None = None) -> bool:
    """Whether logits of the run have p-values: under a null model, or empirical ones."""
    return named is not None or log.kde is not None or routed_empirically(log)


def routed_empirically(log: Log) -> bool:
    """Whether the run's p-values ranked the logits of each forward among themselves."""
    options = log.manifest.routing.options
    return options is not None and options.p_values == "empirical"


def _own(log: Log) -> KdeModel:
    if log.kde is None:
        log.require_logits()
        raise KdeMismatch(
            f"{log.path} has no null model of its own; fit one with bhlog kde fit {log.path} "
            f"--trim-high {log.manifest.model.top_k} --out null.parquet and name it (--kde, "
            "or kde= in Python)"
        )
    return log.kde


def _remote(uri: str) -> KdeModel:
    fs, path = filesystem(uri)
    if not path.endswith(".parquet"):
        return _own(Log(uri))
    with reached(uri), fs.open_input_stream(path) as stream:
        data = stream.read()
    return KdeModel.from_bytes(data, shown(uri))
