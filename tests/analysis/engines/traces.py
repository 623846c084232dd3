"""Traces for tests: importing them by the command, and reading runs back as plain Python."""

import base64
import struct

import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.run import open_log


def run_command(capsys, *arguments):
    """Exit code, stdout and stderr of `bhlog import`; errors are one line."""
    with pytest.raises(SystemExit) as stop:
        main(["import", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and (stop.value.code == 0 or not out)
    return stop.value.code, out, err


def rows(run, *columns):
    """(layer, sequence, position) and these columns of each row, in order of the three."""
    log, keys = open_log(run), ("layer", "sequence", "position")
    read = (log.read(group, [*keys, *columns]).to_pylist() for group in log.row_groups())
    return sorted(tuple(row[name] for name in (*keys, *columns)) for part in read for row in part)


def npy(dtype, shape, *values, code):
    """The bytes of a .npy file by the format's definition: magic, version, header, values."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    data = struct.pack(f"<{len(values)}{code}", *values)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def base64_of(data):
    return base64.b64encode(data).decode()
