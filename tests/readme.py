"""The README's commands: each can be run, and what it prints be written back into the README.

python -m tests.readme

runs every console and Python block in order, in one folder, and replaces the output that the README
shows by what was printed.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
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


def steps() -> list[Step]:
    """What the README has its reader run, in order."""
    blocks = _BLOCK.finditer(README.read_text(encoding="utf-8"))
    return [step for block in blocks for step in _steps_of(block[1], block[2])]


def make_texts(folder: Path) -> None:
    """The texts that the README's commands read."""
    (folder / "notes.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    (folder / "talk.jsonl").write_text('{"text": "How are you?"}\n{"text": "Fine, thank you."}\n')


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


def _steps_of(language: str, body: str) -> list[Step]:
    if language == "python":
        return [Step(language, body)]
    found = []
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        n = next(i for i, line in enumerate(lines) if not line.endswith("\\")) + 1
        found.append(Step(language, "\n".join(lines[:n]), "\n".join(lines[n:])))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_texts(folder)

        def rewritten(block: "re.Match[str]") -> str:
            parts = []
            for step in _steps_of(block[1], block[2]):
                done = run(step, folder)
                if done.returncode:
                    sys.exit(f"{step.text}\n{done.stdout}{done.stderr}")
                print(step.text.splitlines()[0], file=sys.stderr)
                printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
                parts.append(f"$ {step.text}\n{printed}\n" if printed else f"$ {step.text}\n")
            return block[0] if block[1] == "python" else f"```console\n{''.join(parts)}```"

        text = _BLOCK.sub(rewritten, README.read_text(encoding="utf-8"))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
