"""What is installed: one package, typed, whose names nothing of the user's can shadow."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import analysis
import bhlog
import capture

ROOT = Path(__file__).parents[1]
FOLDERS = ("analysis", "capture", "sql")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def python(code, folder, site=None):
    """What a program prints that starts in a folder, with the packages of a site folder first."""
    paths = "" if site is None else f"import sys; sys.path.insert(1, {str(site)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, so that nothing of earlier builds gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", out, source], check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    """A folder as an installation makes it."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_every_folder_of_modules_is_listed():
    modules = [path for top in FOLDERS for path in (ROOT / top).rglob("*.[ps][yq]*")]
    folders = {path.parent.relative_to(ROOT) for path in modules if "__pycache__" not in path.parts}
    names = {f"bhlog.{'.'.join(folder.parts)}" for folder in folders}
    inside = {name for name in names if not name.startswith("bhlog.capture.apps.names")}
    assert sorted(SETTINGS["packages"]) == sorted({"bhlog", *inside})


def test_the_names_in_a_clone_are_those_of_the_installed_package():
    assert bhlog.__all__ == sorted({*capture.__all__, *analysis.__all__})
    for name in analysis.__all__:
        assert getattr(analysis, name) is getattr(bhlog, name)


def test_the_names_of_capture_in_a_clone_are_those_of_the_installed_package():
    pytest.importorskip("torch", reason="most of them need torch")
    for name in capture.__all__:
        assert getattr(capture, name) is getattr(bhlog, name)


@pytest.mark.parametrize("name", ["analysis.log", "capture.contract.errors"])
def test_no_module_can_be_imported_a_second_time_from_a_clone(name):
    with pytest.raises(ModuleNotFoundError):
        __import__(name)


@pytest.mark.slow
def test_a_wheel_holds_each_file_once_and_no_test(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    kept = [n for n in names if ".dist-info/" not in n]
    ours = {
        f"bhlog/{path.relative_to(ROOT)}"
        for top in FOLDERS
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".pyi", ".sql", ".json", ".safetensors", ".css", ".html", ".js")
        and not {"__pycache__", "names"} & {*path.parts}
    }
    facade = {"analysis.py", "capture.py", "bhlog/__init__.py", "bhlog/__init__.pyi"}
    card = "bhlog/capture/demo/MODEL_CARD.md"
    assert sorted(kept) == sorted({*ours, *facade, "bhlog/py.typed", card})


@pytest.mark.slow
@pytest.mark.parametrize("init", [True, False], ids=["package", "plain folder"])
def test_it_works_beside_folders_of_the_same_names(site, tmp_path, init):
    for name in FOLDERS[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("answer = 42\n")
        if init:
            (tmp_path / name / "__init__.py").write_text("own = True\n")
    code = (
        "import bhlog, analysis.mine, capture.mine\n"
        "from bhlog import FitOptions, KdeModel, open_log\n"
        "assert 'torch' not in sys.modules\n"
        f"assert bhlog.__file__.startswith({str(site)!r})\n"
        "print(analysis.mine.answer, capture.mine.answer)\n"
        f"assert {init} or analysis.open_log is open_log and capture.KdeModel is KdeModel\n"
    )
    assert python(code, tmp_path, site) == "42 42"


@pytest.mark.slow
def test_where_nothing_shadows_them_both_halves_give_the_same_objects(site, tmp_path):
    offline = "KdeModel", "load_kde_models"
    code = (
        "import analysis, bhlog, capture\n"
        "for name in analysis.__all__: assert getattr(analysis, name) is getattr(bhlog, name)\n"
        f"for name in {offline}: assert getattr(capture, name) is getattr(bhlog, name)\n"
        "print(bhlog.__file__, 'torch' in sys.modules)\n"
    )
    assert python(code, tmp_path, site) == f"{site}/bhlog/__init__.py False"


@pytest.mark.slow
def test_a_type_checker_sees_the_types_of_an_installed_bhlog(site, tmp_path):
    pytest.importorskip("mypy", reason="needs mypy")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "here.pth").write_text("\n".join([str(site), *others]))
    assert_typed(tmp_path, environment / "bin/python")


@pytest.mark.slow
def test_a_type_checker_sees_the_types_of_an_editable_bhlog(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy")
    assert_typed(tmp_path, sys.executable)


def assert_typed(folder, interpreter):
    """Names of both halves, asked for in a program of the user's, have types for mypy."""
    user = folder / "user.py"
    user.write_text(
        "from bhlog import KdeModel, observe, open_log\n"
        "reveal_type(open_log)\nreveal_type(observe)\nreveal_type(KdeModel.load('f'))\n"
    )
    (folder / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*,transformers.*,polars.*,scipy.*,duckdb.*,matplotlib.*]\n"
        "follow_imports = skip\n"  # nothing of theirs is asked, and reading them takes a minute
    )
    kept = ["--cache-dir", str(folder.parent / "kept")]  # what both read of Python is the same
    mypy = [sys.executable, "-m", "mypy", *kept, "--python-executable", interpreter, user.name]
    done = subprocess.run(mypy, cwd=folder, capture_output=True, text=True)
    told = [line.partition('Revealed type is "')[2] for line in done.stdout.splitlines()[:3]]
    assert done.returncode == 0, done.stdout
    assert told[0].startswith("def (path: ") and " -> bhlog.analysis." in told[0]
    assert told[1].startswith("def (model: ") and "RouterPatcher" in told[1]
    assert told[2].startswith("bhlog.capture.contract.null.model.KdeModel")
