from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bhlog.capture.checkpoint import LoadedModel

# Imported inside: the tests of the contract, below this folder, run without torch.


@pytest.fixture(scope="session")
def demo() -> "LoadedModel":
    """The bundled model; tests must leave it as they found it."""
    from bhlog.capture.checkpoint import load_model

    return load_model("demo")


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random model; tests must leave it as they found it."""
    from tests.capture.tiny import tiny_model

    return tiny_model()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Where a run may be written."""
    return tmp_path / "run"
