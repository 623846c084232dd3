"""Before the tests: what stands in for an installation, what needs torch, compiled functions."""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
NEED_TORCH = (TESTS / "capture", TESTS / "demo_model", TESTS / "test_readme.py")
NEED_NO_TORCH = TESTS / "capture" / "contract"
OFFLINE = find_spec("torch") is None


def pytest_configure() -> None:
    if find_spec("bhlog") is None:
        _link_packages()
    _forget_old_kernels()


def pytest_report_header() -> str | None:
    if not OFFLINE:
        return None
    left_out = ", ".join(str(path.relative_to(ROOT)) for path in NEED_TORCH)
    return f"no torch: {left_out} are left out, but for {NEED_NO_TORCH.relative_to(ROOT)}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch, files of the folders that need it are not even imported."""
    above = {collection_path, *collection_path.parents}
    needed = not above.isdisjoint(NEED_TORCH) and NEED_NO_TORCH not in above
    return True if OFFLINE and needed and collection_path.is_file() else None


def _link_packages() -> None:
    """Make bhlog importable in a clone where it is not installed, in child processes too."""
    site = Path(tempfile.mkdtemp(prefix="bhlog-"))
    atexit.register(shutil.rmtree, site)
    names = ROOT / "capture/apps/names/bhlog"
    (site / "bhlog").mkdir()
    for source in (*names.glob("*.py*"), ROOT / "analysis", ROOT / "capture", ROOT / "sql"):
        (site / "bhlog" / source.name).symlink_to(source)
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])


def _forget_old_kernels() -> None:
    """Numba notices a change of a function's own file, not of those whose functions it inlines."""
    spec = find_spec("bhlog.analysis.kernels")
    assert spec and spec.submodule_search_locations
    for kernels in map(Path, spec.submodule_search_locations):
        changed = max(source.stat().st_mtime for source in kernels.glob("*.py"))
        for cached in kernels.glob("__pycache__/*.nb?"):
            if cached.stat().st_mtime < changed:
                cached.unlink(missing_ok=True)
