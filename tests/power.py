"""Power cuts: what a disk may hold after one, by what was written, synced and renamed before.

The strictest reading of POSIX: what was written to a file is there once the file was synced, a
name, new, changed or gone, once its folder was. What came after that is lost, or not, in any order.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.disk import Disk

HOWS = ("lost", "there", "named", "some")
ROOT = 0


class Change(NamedTuple):
    """What happens to the names in a folder, at once."""

    gone: tuple[str, ...]
    there: dict[str, int]


class State:
    """A folder, as programs see it and as the disk has it.

    Attributes:
        said: what the job had said by then.
    """

    def __init__(self) -> None:
        self.said: list[Any] = []
        self._names: dict[int, dict[str, int]] = {ROOT: {}}  # of folders
        self._kept: dict[int, dict[str, int]] = {ROOT: {}}
        self._ahead: dict[int, list[Change]] = {ROOT: []}  # of what is kept
        self._data: dict[int, bytearray] = {}  # of files
        self._synced: dict[int, bytes] = {}
        self._last = 1_000_000  # the disk numbers files, this folders and what was there before

    def found(self, root: Path) -> None:
        """Take what lies in a folder as having been there for long."""
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root).as_posix()
            if path.is_dir():
                self.do("folder", inside)
            else:
                self._last += 1
                self.do("make", inside, self._last)
                self.do("write", self._last, 0, path.read_bytes())
                self.do("sync", self._last)
            self.do("sync", inside.rpartition("/")[0] or ".")

    def do(self, verb: str, *what: Any) -> None:
        """Follow what was done."""
        if verb == "say":
            self.said.append(what[0])
        elif verb == "write":
            number, at, data = what
            self._data[number][at : at + len(data)] = data
        elif verb == "sync" and isinstance(what[0], int):
            self._synced[what[0]] = bytes(self._data[what[0]])
        elif verb == "sync":
            folder = self._find(what[0])
            self._kept[folder], self._ahead[folder] = dict(self._names[folder]), []
        elif verb == "make":
            path, number = what
            self._data[number], self._synced[number] = bytearray(), b""
            self._change(path, number)
        elif verb == "folder":
            self._last += 1
            self._names[self._last], self._kept[self._last] = {}, {}
            self._ahead[self._last] = []
            self._change(what[0], self._last)
        elif verb == "remove":
            self._change(what[0], None)
        else:
            assert verb == "rename"
            (old, old_name), (new, new_name) = map(self._split, what)
            number = self._names[old].pop(old_name)
            self._names[new][new_name] = number
            if old == new:
                self._ahead[old].append(Change((old_name,), {new_name: number}))
            else:
                self._ahead[old].append(Change((old_name,), {}))
                self._ahead[new].append(Change((), {new_name: number}))

    def left(self, how: str, dice: random.Random) -> dict[str, bytes | None]:
        """What may be left by a power cut now: files by path; None is a folder.

        Args:
            how: "lost": nothing that was not synced; "there": all of it; "named": every name, but
                no data; "some": any of it.
        """
        tree: dict[str, bytes | None] = {}

        def data(number: int) -> bytes:
            now, synced = bytes(self._data[number]), self._synced[number]
            if how == "there":
                return now
            if how == "some" and now != synced and dice.random() < 0.5:
                cut = dice.randrange(len(now) + 1)
                return now[:cut] + bytes(len(now) - cut)
            return synced

        def build(folder: int, path: str) -> None:
            names = dict(self._kept[folder])
            for change in self._ahead[folder]:
                if how in ("there", "named") or (how == "some" and dice.random() < 0.5):
                    for name in change.gone:
                        names.pop(name, None)
                    names.update(change.there)
            for name, number in names.items():
                if number in self._names:
                    tree[f"{path}{name}"] = None
                    build(number, f"{path}{name}/")
                else:
                    tree[f"{path}{name}"] = data(number)

        build(ROOT, "")
        return tree

    def _change(self, path: str, number: int | None) -> None:
        folder, name = self._split(path)
        if number is None:
            del self._names[folder][name]
            self._ahead[folder].append(Change((name,), {}))
        else:
            self._names[folder][name] = number
            self._ahead[folder].append(Change((), {name: number}))

    def _split(self, path: str) -> tuple[int, str]:
        above, _, name = path.rpartition("/")
        return self._find(above), name

    def _find(self, path: str) -> int:
        folder = ROOT
        for name in path.split("/"):
            if name not in ("", "."):
                folder = self._names[folder][name]
        return folder


def cuts(disk: Disk, before: Path, place: Path) -> Iterator[tuple[str, list[Any], Path]]:
    """Every different folder that a cut after any of what was done may leave, in turn at `place`.

    Args:
        before: what was there before it.

    Yields:
        What the cut was, what the job had said, and the folder.
    """
    dice, state, seen = random.Random(0), State(), set()
    state.found(before)
    for number, step in enumerate([("say", "started"), *disk.done]):
        state.do(*step)
        if step[0] == "write":
            continue
        for how in HOWS:
            tree = state.left(how, dice)
            key = (frozenset(tree.items()), len(state.said))
            if key in seen:
                continue
            seen.add(key)
            folder = place / f"{number}-{how}"
            folder.mkdir(parents=True)
            for path, data in tree.items():
                if data is None:
                    (folder / path).mkdir()
                else:
                    (folder / path).write_bytes(data)
            yield f"{how} after {number}: {step[:3]}", state.said[1:], folder
