"""Before the tests: compiled functions that are older than a source they take part in go."""

from pathlib import Path

KERNELS = Path(__file__).parents[1] / "analysis/kernels"


def pytest_configure() -> None:
    """Numba notices a change of a function's own file, not of those whose functions it inlines."""
    changed = max(source.stat().st_mtime for source in KERNELS.glob("*.py"))
    for cached in KERNELS.glob("__pycache__/*.nb?"):
        if cached.stat().st_mtime < changed:
            cached.unlink(missing_ok=True)
