"""Formats: the readers of traces, by name."""

from importlib import import_module
from os.path import realpath
from pathlib import Path

from bhlog.analysis.engines.trace import Told, Trace
from bhlog.capture.contract.errors import InvalidOption

# Where each is read: modules are imported when they are used.
READERS = {
    "megatron": "bhlog.analysis.engines.megatron",
    "numpy": "bhlog.analysis.engines.npy_files",
    "vllm": "bhlog.analysis.engines.vllm",
    "sglang": "bhlog.analysis.engines.sglang",
    "sglang.pt": "bhlog.capture.apps.recorder_dump",
    "route-trace": "bhlog.analysis.engines.route_trace",
}
NOTHING = Told()


def read_trace(format: str, path: str | Path, told: Told = NOTHING) -> Trace:
    """Begin to read a trace: what it is of, and its tokens as they are asked for.

    Args:
        path: its file or folder.
        told: what the trace does not tell.

    Raises:
        InvalidOption: no such format, or something is to be told.
        CorruptTrace: it is none of the format; on the way, too.
        OSError: it cannot be read.
    """
    if format not in READERS or "." in format:
        names = ", ".join(name for name in READERS if "." not in name)
        raise InvalidOption(f"format must be one of {names}, got {format!r}")
    path = Path(realpath(path)) if Path(path).is_symlink() else Path(path)
    reader = READERS.get(f"{format}{path.suffix}", READERS[format])
    trace: Trace = import_module(reader).read(path, told)
    return trace
