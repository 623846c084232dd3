"""The READMEs' commands: each can be run, and what it prints be written back into its README.

python -m tests.readme [FILE...]

runs every console and Python block of each README in order, and replaces the output that it shows
by what was printed. A README's reader works in a folder of its own, that holds two texts and the
runs of `bhlog demo`; the first README's holds the texts alone, since it runs the demo itself.
"""

import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST = ROOT / "README.md"
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SECONDS = 300


@dataclass(frozen=True)
class Step:
    """Something a reader would run.

    Attributes:
        language: console or python.
        text: the command, or the program.
        shown: what the README says it prints; "" for programs.
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
    """Run one step in a folder, with this environment's bhlog; a program's warnings are errors."""
    bin_folder = Path(sys.executable).parent
    shell = ["bash", "-o", "pipefail", "-c"]
    arguments = [*shell] if step.language == "console" else [sys.executable, "-W", "error", "-c"]
    return subprocess.run(
        [*arguments, step.text],
        cwd=folder,
        env=os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )


@functools.cache
def _demo() -> Path:
    """A folder in which `bhlog demo` ran, once in this process."""
    folder = Path(tempfile.mkdtemp(prefix="bhlog-demo-"))
    atexit.register(shutil.rmtree, folder)
    done = run(Step("console", "bhlog demo"), folder)
    if done.returncode:
        raise RuntimeError(f"bhlog demo\n{done.stdout}{done.stderr}")
    return folder


def _steps_of(language: str, body: str) -> list[Step]:
    if language == "python":
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
            printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
            parts.append(f"$ {step.text}\n{printed}\n" if printed else f"$ {step.text}\n")
        return block[0] if block[1] == "python" else f"```console\n{''.join(parts)}```"

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
