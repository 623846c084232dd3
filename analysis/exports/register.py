"""Every export by the name of its format."""

from bhlog.analysis.exports.loads import hot, load
from bhlog.analysis.exports.threshold_file import thresholds
from bhlog.analysis.exports.top_ks import topk
from bhlog.analysis.exports.wanted import Export, Wanted
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import whole_file

EXPORTS: dict[str, Export] = {"topk": topk, "load": load, "hot": hot, "thresholds": thresholds}


def export(format: str, wanted: Wanted, out: str) -> None:
    """Write an answer for another engine, whole or not at all; see EXPORTS for what is in it.

    Args:
        out: a file, or the URI of an object.

    Raises:
        InvalidOption: no such format, a question that the run cannot answer, or the file cannot be
            written.
        KdeMismatch: there is no null model that serves.
    """
    if format not in EXPORTS:
        raise InvalidOption(f"format must be one of {', '.join(EXPORTS)}, got {format!r}")
    data = EXPORTS[format](wanted)
    try:
        with whole_file(out) as file:
            file.write(data)
    except OSError as error:
        raise InvalidOption(f"{out}: cannot be written ({error.strerror or error})") from error
