"""A notebook opens a run, replays it, asks it in SQL and plots it, whether ipywidgets is there."""

import subprocess
import sys

import pytest

from tests.synthetic import normal_kde, write_run

nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel run notebooks")
nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel run notebooks")

CELLS = (
    "import sys; sys.path[:0] = {paths!r}",
    "from bhlog.analysis.run import open_log; run = open_log({run!r})",
    "run.replay([0.1, 0.3])",
    "run.sql('SELECT layer, avg(n_selected) AS mean FROM routing GROUP BY layer').pl()",
    "run.sql('SELECT count(*) FROM routing')",
    "import polars as pl\n"
    "df = pl.DataFrame({{'position': [1]}})\n"
    "run.sql('SELECT * FROM df JOIN tokens USING (position)', df=df).df()",
    "import time; started = time.time()\n"
    "run.sql('SELECT sum(a.range * b.range) FROM range(40000) a, range(40000) b').fetchall()\n"
    "assert time.time() - started < 100",
    "figure = run.plot(['mean_experts'])",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook's own libraries
@pytest.mark.parametrize("widgets", [False, True])
def test_a_notebook_runs_through(tmp_path, widgets):
    run = write_run(tmp_path / "demo", n_sequences=2, length=20, kde=normal_kde((0, 1, 2)))
    paths = []
    if widgets:
        packages = ("ipywidgets", "jupyterlab_widgets", "widgetsnbextension", "comm")
        place = tmp_path / "packages"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place]
        done = subprocess.run([*map(str, install), *packages], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot install ipywidgets: {done.stderr.strip()[-200:]}")
        paths.append(str(place))
    cells = [nbformat.v4.new_code_cell(c.format(paths=paths, run=str(run))) for c in CELLS]
    cells.append(nbformat.v4.new_code_cell("import importlib.util as u; u.find_spec('ipywidgets')"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbclient.NotebookClient(notebook, timeout=120).execute(cwd=str(tmp_path))
    assert bool(notebook.cells[-1].outputs) == widgets
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "stream" or "rror" not in output.text, output
