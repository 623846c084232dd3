"""Libraries that a command needs or does without."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from bhlog.capture.contract.errors import MissingExtra


def needed(library: str, extra: str) -> Any:
    """A library that an extra of bhlog installs.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs the package {error.name}: pip install 'bhlog[{extra}]'"
        ) from error


class Unneeded(MetaPathFinder):
    """Has Arrow and Numba find what no offline command uses as if it were not installed.

    Arrow imports pandas, in 0.5 s, as soon as a Python value becomes a column; Numba imports
    scipy.linalg, in 0.25 s, for matrix products. Both go without where there is none.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "pandas" or (name == "scipy.linalg" and _begins("numba.np.arraymath")):
            raise ModuleNotFoundError(f"{name} is not needed", name=name)
        return None


def leave_out_unneeded() -> None:
    """From now on, for good: only in a process that runs one command."""
    sys.meta_path.insert(0, Unneeded())


def _begins(name: str) -> bool:
    """Whether a module is being imported."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
