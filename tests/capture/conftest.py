from pathlib import Path
from typing import Any

import pytest

from bhlog.capture.session import LoadedModel, load_model
from tests.capture.tiny import tiny_model


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """The bundled model; tests must leave it as they found it."""
    return load_model("demo")


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random model; tests must leave it as they found it."""
    return tiny_model()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Where a run may be written."""
    return tmp_path / "run"
