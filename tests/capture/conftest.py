import pytest

from capture.session import LoadedModel, load_model


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """The bundled model; tests must leave it as they found it."""
    return load_model("demo")
