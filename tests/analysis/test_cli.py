import shlex
import subprocess
import sys

import pytest

from bhlog.analysis.cli import COMMANDS, bhlog, main
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run


def test_every_command_has_help_that_ends_in_an_example(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        commands = [line for line in text.splitlines() if line.strip().startswith("bhlog ")]
        assert commands, f"{name} shows no example"


def test_a_mistyped_command_gets_the_nearest_right_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["reply"])
    assert end.value.code == 2
    assert "did you mean 'replay'?" in capsys.readouterr().err


def test_listing_commands_imports_neither_torch_nor_duckdb():
    code = (
        "import sys; from bhlog.analysis.cli import bhlog; "
        "[bhlog.get_command(None, name) for name in bhlog.list_commands(None)]; "
        "print([m for m in ('torch', 'transformers', 'duckdb', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_list_says_of_each_command_what_its_own_help_does():
    limit = 78 - 6 - max(map(len, COMMANDS))  # as click lists commands on a terminal
    for name, (_, short) in COMMANDS.items():
        command = bhlog.get_command(None, name)
        assert short == command.get_short_help_str(limit), name


def test_help_and_a_mistyped_command_load_no_library_of_numbers():
    code = (
        "import sys\nfrom bhlog.analysis.cli import main\n"
        "try:\n    main([sys.argv[1]])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('numpy', 'pyarrow', 'polars', 'rich') if m in sys.modules])"
    )
    for argument in ("--help", "reply"):
        command = [sys.executable, "-c", code, argument]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def modules_after_importing(package):
    """Names of the modules that all modules of a package bring with them."""
    code = (
        f"import pkgutil, importlib, sys, {package} as package; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, "
        "package.__name__ + '.')]; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_analysis_imports_no_torch_and_only_the_contract_of_capture():
    modules = modules_after_importing("bhlog.analysis")
    assert not modules & {"torch", "transformers"}
    ours = {name for name in modules if name.startswith("bhlog.capture.")}
    assert all(name.startswith("bhlog.capture.contract") for name in ours)


def test_the_contract_needs_numpy_and_pyarrow_alone():
    modules = {name.partition(".")[0] for name in modules_after_importing("bhlog.capture.contract")}
    assert {"numpy", "pyarrow"} <= modules
    assert not modules & {"analysis", "duckdb", "matplotlib", "polars", "scipy", "torch"}


def test_commands_are_listed_in_the_order_of_a_first_use():
    assert bhlog.list_commands(None)[:2] == ["demo", "capture"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "info RUN", "verify RUN --replay", "replay RUN --alpha 0.1",
        "replay RUN --alpha 0.1 --out NEW", "sweep RUN", "compare RUN", "fidelity RUN RUN",
        "kde fit RUN --out NEW", "kde show RUN", "kde check RUN RUN",
        "sql RUN 'SELECT count(*) FROM routing'", "plot RUN mean_experts",
    ],
)  # fmt: skip
def test_offline_commands_import_no_pandas_and_no_matrix_products(tmp_path, command):
    """Arrow and Numba would import them, in 0.5 and 0.25 s, wherever they are installed."""
    run = write_run(tmp_path / "run", options=BhOptions(alpha=0.3), kde=normal_kde(range(3)))
    words = shlex.split(command.replace("RUN", str(run)).replace("NEW", str(tmp_path / "new")))
    code = (
        "import sys; from bhlog.analysis.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'pandas', 'scipy.linalg.cython_blas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
