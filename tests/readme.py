"""The READMEs' commands: each can be run, and what it prints be written back into its README.

python -m tests.readme [FILE...]

runs every block of each README in order, and replaces the output that it shows by what was printed.
A README's reader works in a folder of its own, that holds two texts and the runs of `bhlog demo`;
the first README's holds the texts alone, since it runs the demo itself. Kinds of blocks:

```console  commands after `$ `, each followed by what it prints on a terminal of 80 columns; where
            that ends in a line `...`, the first lines of it
```python   a program
```sh run   commands whose output is not shown
```sh       for the reader alone, such as installing: not run

There is no network: a model of the hub is the demo's, which stands in a local cache under its name.
"""

import atexit
import fcntl
import functools
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST = ROOT / "README.md"
HUB_MODEL = "allenai/OLMoE-1B-7B-0924"
_BLOCK = re.compile(r"^```(console|python|sh run)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # bold, as a terminal is told
_REST = "..."
_SECONDS = 300
_TERMINAL = struct.pack("4H", 24, 80, 0, 0)  # lines, columns


@dataclass(frozen=True)
class Step:
    """Something a reader would run.

    Attributes:
        language: console, python or sh run.
        text: the command, the program, or commands a line each.
        shown: what the README says it prints; "" for blocks that show nothing.
    """

    language: str
    text: str
    shown: str = ""


def readmes() -> list[Path]:
    """Every README of the repository, the one at the top first."""
    tops = ("analysis", "capture", "sql", "tests")
    return [FIRST, *sorted(path for top in tops for path in (ROOT / top).rglob("README.md"))]


def steps(readme: Path) -> list[Step]:
    """What a README has its reader run, in order."""
    blocks = _BLOCK.finditer(readme.read_text(encoding="utf-8"))
    return [step for block in blocks for step in _steps_of(block[1], block[2])]


def make_folder(folder: Path, readme: Path) -> None:
    """What is there before a README's first step: texts, and the demo's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    (folder / "talk.jsonl").write_text('{"text": "How are you?"}\n{"text": "Fine, thank you."}\n')
    if readme != FIRST and steps(readme):
        shutil.copytree(_demo() / "runs", folder / "runs")


def run(step: Step, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run one step in a folder, with this environment's bhlog; a program's warnings are errors.

    stdout is a terminal of 80 columns, stderr a pipe.
    """
    bin_folder = Path(sys.executable).parent
    shell = ["bash", "-e", "-o", "pipefail", "-c"]
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_CACHE": str(_hub_cache()),
        "HF_HUB_OFFLINE": "1",
    }
    arguments = [sys.executable, "-W", "error", "-c"] if step.language == "python" else shell
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, _TERMINAL)
    printed: list[bytes] = []
    reader = threading.Thread(target=_read, args=(terminal, printed))
    reader.start()
    try:
        done = subprocess.run(
            [*arguments, step.text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=end,
            stderr=subprocess.PIPE,
            timeout=_SECONDS,
        )
    finally:
        os.close(end)
        reader.join()
        os.close(terminal)
    stdout = _STYLE.sub("", b"".join(printed).decode()).replace("\r\n", "\n")
    return subprocess.CompletedProcess(step.text, done.returncode, stdout, done.stderr.decode())


def _read(terminal: int, printed: list[bytes]) -> None:
    """What arrives at a terminal, until nobody has its other end."""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # so Linux says that the other end is closed
            return
        if not part:
            return
        printed.append(part)


@functools.cache
def _demo() -> Path:
    """A folder in which `bhlog demo` ran, once in this process."""
    folder = Path(tempfile.mkdtemp(prefix="bhlog-demo-"))
    atexit.register(shutil.rmtree, folder)
    done = run(Step("console", "bhlog demo"), folder)
    if done.returncode:
        raise RuntimeError(f"bhlog demo\n{done.stdout}{done.stderr}")
    return folder


@functools.cache
def _hub_cache() -> Path:
    """A cache of the hub that holds the demo's model as HUB_MODEL."""
    cache = Path(tempfile.mkdtemp(prefix="bhlog-hub-"))
    atexit.register(shutil.rmtree, cache)
    model = cache / f"models--{HUB_MODEL.replace('/', '--')}"
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "capture" / "demo" / name, snapshot / name)
    return cache


def _steps_of(language: str, body: str) -> list[Step]:
    if language != "console":
        return [Step(language, body)]
    found = []
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        n = next(i for i, line in enumerate(lines) if not line.endswith("\\")) + 1
        found.append(Step(language, "\n".join(lines[:n]), "\n".join(lines[n:])))
    return found


def rewrite(readme: Path, folder: Path) -> None:
    """Run a README's steps in a folder and write what they print into it."""

    def rewritten(block: "re.Match[str]") -> str:
        parts = []
        for step in _steps_of(block[1], block[2]):
            done = run(step, folder)
            if done.returncode:
                sys.exit(f"{readme}: {step.text}\n{done.stdout}{done.stderr}")
            print(f"{readme.relative_to(ROOT)}: {step.text.splitlines()[0]}", file=sys.stderr)
            lines = [line.rstrip() for line in done.stdout.splitlines()]
            if step.shown.endswith(_REST):
                lines[step.shown.count("\n") :] = [_REST]
            printed = "\n".join(lines)
            parts.append(f"$ {step.text}\n{printed}\n" if printed else f"$ {step.text}\n")
        return block[0] if block[1] != "console" else f"```console\n{''.join(parts)}```"

    text = _BLOCK.sub(rewritten, readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")


def main() -> None:
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or readmes()
    for readme in chosen:
        with tempfile.TemporaryDirectory() as name:
            make_folder(Path(name), readme)
            rewrite(readme, Path(name))


if __name__ == "__main__":
    main()
