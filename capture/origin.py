"""How a run comes to be, as its manifest keeps it: command, code, texts and tokenizer."""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bhlog.capture.contract.manifest import Origin
from bhlog.capture.contract.uris import command_line

_GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
_GIT_SECONDS = 5.0


def origin_here(*, texts: Mapping[str, str] | None = None, tokenizer: str | None = None) -> Origin:
    """Of a run that this process makes.

    Args:
        texts: sha256 of each text file by its source.
        tokenizer: its folder or hub name, or "bytes".
    """
    program, *rest = sys.argv or [""]
    words = () if _is_kernel(program) else command_line([Path(program).name, *rest])
    return Origin(words, _commit(Path.cwd()), dict(texts or {}), tokenizer)


def _is_kernel(program: str) -> bool:
    """Whether a notebook's kernel runs here, whose command line says nothing of the notebook."""
    return Path(program).name == "ipykernel_launcher.py"


@functools.cache
def _commit(folder: Path) -> str | None:
    """Commit of the repository that a folder is in, as it is when this process first asks."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        found = subprocess.run(
            _GIT,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None  # no git here, or a repository too large to look through
    return found.stdout.strip() or None if found.returncode == 0 else None
