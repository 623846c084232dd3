"""Files and --shell-command open in the oldest readers that the documentation names."""

import subprocess
import sys

import pytest

from bhlog.analysis.database.shell import shell_statements
from bhlog.analysis.run import open_log
from tests.synthetic import normal_kde, write_run

# Each in an environment of its own; pyarrow 12 and pandas 2.0 were built for numpy 1.
OLDEST = {
    "duckdb": ("duckdb==0.10.3",),
    "polars": ("polars==1.0.0",),
    "pyarrow": ("pyarrow==12.0.1", "numpy==1.26.4"),
    "pandas": (
        "pandas==2.0.3",
        "pyarrow==12.0.1",
        "numpy==1.26.4",
        "pytz",
        "python-dateutil",
        "six",
        "tzdata",
    ),
}

READ = {
    "duckdb": """
import duckdb
c = duckdb.connect()
c.execute(open(sys.argv[2]).read())
print(*c.execute("SELECT count(*), sum(list_sum(experts)), sum(token_id) FROM routing").fetchone())
assert c.execute("SELECT count(logit + weight) FROM selections").fetchone()[0] > 0
assert c.execute("SELECT count(nll) FROM tokens").fetchone()[0] > 0
assert c.execute("SELECT count(*) FROM runs, kde").fetchone()[0] > 0
""",
    "polars": """
import polars as pl
pl.enable_string_cache()
d = pl.concat([pl.read_parquet(f) for f in routing])
print(d.height, d["experts"].list.sum().sum(), d["token_id"].sum())
assert all(d["logits"].to_list()) and d["weights"].list.sum().sum() > 0
assert all(pl.read_parquet(f)["nll"].sum() > 0 for f in tokens)
""",
    "pyarrow": """
import pyarrow as pa, pyarrow.parquet as pq
rows = [r for f in routing for r in pq.read_table(f).to_pylist()]
print(len(rows), sum(sum(r["experts"]) for r in rows), sum(r["token_id"] for r in rows))
assert all(len(r["logits"]) and len(r["weights"]) for r in rows)
assert all(len(pq.read_table(f).to_pylist()) for f in tokens)
""",
    "pandas": """
import pandas as pd
d = pd.concat([pd.read_parquet(f) for f in routing])
print(len(d), int(sum(e.astype(int).sum() for e in d["experts"])), int(d["token_id"].sum()))
assert all(len(x) for x in d["logits"]) and all(len(pd.read_parquet(f)) for f in tokens)
""",
}
START = """
import sys
from pathlib import Path
routing = sorted(Path(sys.argv[1], "routing").iterdir())
tokens = sorted(Path(sys.argv[1], "tokens").iterdir())
"""


@pytest.mark.slow
@pytest.mark.parametrize("reader", OLDEST)
def test_the_oldest_reader_reads_a_run(reader, tmp_path):
    place = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place)]
    done = subprocess.run([*install, *OLDEST[reader]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot install {OLDEST[reader]}: {done.stderr.strip()[-200:]}")
    run = write_run(tmp_path / "demo", n_sequences=4, length=30, kde=normal_kde((0, 1, 2)))
    log = open_log(run)
    statements = tmp_path / "views.sql"
    statements.write_text(shell_statements({"demo": log}))
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(place)!r})\n"]
    command[-1] += START + READ[reader]
    read = subprocess.run([*command, str(run), str(statements)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    rows = [row for batch in log.batches(["experts", "token_id"]) for row in batch.to_pylist()]
    expected = (len(rows), sum(sum(r["experts"]) for r in rows), sum(r["token_id"] for r in rows))
    assert tuple(int(float(x)) for x in read.stdout.split()) == expected
