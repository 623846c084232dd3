"""A process that judges mutants one after the other, under a limit of memory."""

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from bhlog.capture.contract.errors import RouterLogError
from tests.fuzz.mutants import mutate
from tests.fuzz.readers import READERS, Missed, Reader, canonical
from tests.fuzz.world import make_world

MORE_MEMORY = 2 << 30  # bytes that a mutant may take beyond what the libraries have
GOOD = ("same", "right", "refused", "answered")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
)
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class World:
    """The files, as they were before a mutant and again after it.

    Attributes:
        root: their folder.
        answers: what each reader answers on them unchanged.
        strays: what a reader wrote outside, or ran.
    """

    def __init__(self, top: Path, format: str) -> None:
        top.mkdir(exist_ok=True)
        self.root, self._whole = top / "world", top / "whole"
        make_world(self._whole)
        self.restore()
        self.answers = {}
        for name, reader in READERS[format].items():
            self.answers[name] = canonical(reader.ask(self.root))
            if reader.plain is not None:
                right = canonical(reader.plain(self.root))
                assert right == self.answers[name], (name, right, self.answers[name])
        self.strays: list[str] = []
        self._top = str(top)
        sys.addaudithook(self._audit)

    def restore(self) -> None:
        """Files as they were; what was written beside them is gone."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self._whole, self.root, copy_function=shutil.copyfile)

    def beside(self) -> set[str]:
        """Names beside the files' folder."""
        return {path.name for path in Path(self._top).iterdir()}

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in _CHANGES or (event == "open" and int(arguments[2] or 0) & _WRITES)
        if event in _NEVER:
            self.strays.append(f"{event} {arguments}")
        elif writes and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            known = path.startswith((self._top, "/dev/")) or "__pycache__" in path
            if path.startswith("/") and not known:
                self.strays.append(f"{event} {path}")


def judge(world: World, format: str, seed: int) -> dict[str, Any]:
    """Change the world by a seed, ask one reader, and say what came of it."""
    world.restore()
    mutant = mutate(world.root, format, seed)
    readers = READERS[format]
    rng = random.Random(f"reader {format} {seed}")
    (name,) = rng.choices([*readers], [reader.weight for reader in readers.values()])
    world.strays.clear()
    before = world.beside()
    verdict, detail = verdict_of(
        world.root, readers[name], world.answers[name] if mutant.bytes_alone else None
    )
    strays = [*world.strays, *(world.beside() - before)]
    if strays:
        verdict, detail = "outside", "; ".join(strays)
    return {"seed": seed, "reader": name, "verdict": verdict, "words": mutant.words,
            "detail": detail}  # fmt: skip


def verdict_of(root: Path, reader: Reader, unchanged: Any = None) -> tuple[str, str]:
    """A verdict, of which GOOD ones keep the invariant, and what was said.

    Args:
        unchanged: the only right answer, where files are not those that their checksums are of.
    """
    try:
        answer = canonical(reader.ask(root))
    except RouterLogError as error:
        text = str(error)
        return ("refused" if text and text.isprintable() else "lines"), text
    except Missed as error:
        return "missed", str(error)
    except MemoryError as error:
        return "memory", str(error)
    except BaseException as error:  # whatever it is, a user would see it
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = "" if at is None else f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        return "traceback", f"{type(error).__name__} at {where}: {error}"
    if unchanged is not None:
        same = answer == unchanged
        return ("same", "") if same else ("wrong", f"{answer} != {unchanged}")
    if reader.plain is None:
        return "answered", str(answer)
    try:
        right = canonical(reader.plain(root))
    except Exception as error:
        return "wrong", f"{answer}; a plain reader: {type(error).__name__}: {error}"
    return ("right", "") if answer == right else ("wrong", f"{answer} != {right}")


def main() -> None:
    """Judge seeds from START to STOP: a line of JSON each, after a line that says which."""
    format, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="bhlog-fuzz-", ignore_cleanup_errors=True) as top:
        os.environ["TMPDIR"] = tempfile.tempdir = f"{top}/world"
        world = World(Path(top), format)
        pages = Path("/proc/self/statm").read_text().split()[0]
        taken = int(pages) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MORE_MEMORY,) * 2)
        for seed in range(start, stop):
            print(seed, file=report)
            print(json.dumps(judge(world, format, seed)), file=report)


if __name__ == "__main__":
    main()
