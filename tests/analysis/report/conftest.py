"""Pages that several tests read."""

from pathlib import Path

import pytest

from bhlog.analysis.report.document import write_report
from bhlog.analysis.report.subject import Subject
from bhlog.analysis.run import open_log
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 1, 5)


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("native") / "native", layers=LAYERS, length=64)


@pytest.fixture(scope="session")
def rerun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bh") / "bh-0.3"
    options = BhOptions(alpha=0.3, max_k=6)
    return write_run(folder, layers=LAYERS, length=64, options=options, kde=normal_kde(LAYERS))


@pytest.fixture(scope="session")
def page(native, rerun, tmp_path_factory) -> Path:
    """The report of a native run and its rerun under one null model."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    subject = Subject([open_log(native), open_log(rerun)], [rerun / "kde.parquet"])
    return write_report(subject, out)
