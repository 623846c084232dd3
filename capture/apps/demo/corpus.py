"""Real text that every Python carries: its reference documentation and its standard library.

Two sources. `docs` is `pydoc_data.topics`, each topic a document; `code` is the standard
library's own modules, each file a document. Fixed lists of names split both: the demonstration
model was trained on the training part and never saw the held-out part.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    from pydoc_data import topics as _documentation
except ImportError:  # minimal distributions ship none
    _documentation = None  # type: ignore[assignment]

HELD_OUT_TOPICS = frozenset(
    {
        "assert",
        "assignment",
        "binary",
        "comparisons",
        "del",
        "floating",
        "formatstrings",
        "global",
        "identifiers",
        "import",
        "integers",
        "objects",
        "operator-summary",
        "return",
        "strings",
        "subscriptions",
        "typesmapping",
        "typesmodules",
        "typesseq",
        "yield",
    }
)

HELD_OUT_MODULES = frozenset(
    {
        "calendar",
        "cmd",
        "configparser",
        "csv",
        "difflib",
        "fractions",
        "gettext",
        "graphlib",
        "heapq",
        "ipaddress",
        "plistlib",
        "sched",
        "shlex",
        "statistics",
        "tempfile",
        "textwrap",
    }
)

# A short topic is often a section of a longer one, word for word. In neither part: as training
# text it could give away the held-out text that holds it, and a second reading adds nothing.
REPEATED_TOPICS = frozenset(
    {
        "async",  # in compound, as the statements below
        "attribute-access",  # in specialnames
        "augassign",  # in assignment
        "callable-types",  # in specialnames
        "class",
        "context-managers",  # in specialnames
        "customization",  # in specialnames
        "dynamic-features",  # in execmodel
        "else",
        "exceptions",  # in execmodel
        "for",
        "function",
        "id-classes",  # in identifiers
        "if",
        "in",  # in comparisons
        "naming",  # in execmodel
        "numeric-types",  # in specialnames
        "sequence-types",  # in specialnames
        "try",
        "typesseq-mutable",  # in typesseq
        "while",
        "with",
    }
)

# Not entered, wherever they lie: what some distributions leave out or rewrite, tests, tables that
# are neither prose nor program, and the documentation, which is the other source.
SKIPPED = frozenset(
    {
        "__pycache__",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "sitecustomize",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
        "usercustomize",
    }
)


@dataclass(frozen=True)
class Page:
    """One text of the corpus.

    Attributes:
        source: "docs" or "code".
        name: the topic, or the file's path below the standard library with forward slashes.
        text: the whole text, lines ending in a newline.
    """

    source: str
    name: str
    text: str


def training_documents() -> list[Page]:
    """Every document outside the held-out lists: docs first, each source sorted by name.

    A distribution without the documentation or without sources gives fewer documents, not an
    error.
    """
    return [document for document, held_out in _documents() if not held_out]


def held_out_documents() -> list[Page]:
    """The documents that the model never saw in training, in the order of the training part."""
    return [document for document, held_out in _documents() if held_out]


def _documents() -> Iterator[tuple[Page, bool]]:
    """Yield every document with whether it is held out."""
    for name, text in sorted(_topics().items()):
        if name not in REPEATED_TOPICS:
            yield Page("docs", name, text), name in HELD_OUT_TOPICS
    library = Path(sysconfig.get_path("stdlib"))
    modules = _modules(library) if library.is_dir() else ()  # a frozen Python has none
    for path in sorted(modules, key=Path.as_posix):
        name = path.relative_to(library).as_posix()
        # Every module is UTF-8; one that a distribution spoilt should not stop the demo.
        text = path.read_text(encoding="utf-8", errors="replace")
        yield Page("code", name, text), Path(name.split("/")[0]).stem in HELD_OUT_MODULES


def _topics() -> dict[str, str]:
    return {} if _documentation is None else _documentation.topics


def _modules(folder: Path) -> Iterator[Path]:
    """Yield the standard library's own source files in a folder and below, tests left out."""
    for path in folder.iterdir():
        # No importable names: site-packages and the folder of the build's own configuration.
        if not path.stem.isidentifier() or path.stem in SKIPPED:
            continue
        if path.stem.startswith(("test_", "_sysconfigdata")):
            continue
        if path.is_dir():
            yield from _modules(path)
        elif path.suffix == ".py":
            yield path
