"""The floor plan, read from the imports: one ground, two wings, one roof."""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CAPTURE, ANALYSIS = "bhlog.capture", "bhlog.analysis"
CONTRACT, APPS = f"{CAPTURE}.contract", f"{CAPTURE}.apps"
NUMBERS = {
    "bokeh",
    "duckdb",
    "fsspec",
    "matplotlib",
    "numba",
    "numpy",
    "pandas",
    "polars",
    "pyarrow",
}
TERMINAL = {"prompt_toolkit", "rich"}
TORCH = {
    "accelerate",
    "datasets",
    "lm_eval",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
}
HEAVY = NUMBERS | TERMINAL | TORCH | {"scipy"}


class Import(NamedTuple):
    """One import of `module` by `by`: inside a function if lazy, for type checkers if typing."""

    by: str
    module: str
    lazy: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.by} imports {self.module}{' in a function' * self.lazy}"


def within(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@cache
def sources() -> dict[str, Path]:
    """Each module's file, by the name that it is installed as."""
    files = [p for half in ("analysis", "capture") for p in (ROOT / half).rglob("*.py")]
    names = {p: ".".join(("bhlog", *p.relative_to(ROOT).with_suffix("").parts)) for p in files}
    return {
        name.removesuffix(".__init__"): path
        for path, name in names.items()
        if not within(name, f"{APPS}.names")
    }


def found_in(path: Path, by: str, known: set[str]) -> list[Import]:
    """The imports of one file, `from package import module` resolved to the module."""

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(by, alias.name, lazy, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = by.rsplit(".", node.level)[0] if node.level else None
            package = ".".join(filter(None, (above, node.module)))
            names = [f"{package}.{alias.name}" for alias in node.names]
            yield from (Import(by, n if n in known else package, lazy, typing) for n in names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy, typing)

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), False, False))


@cache
def imports() -> list[Import]:
    known = set(sources())
    return [one for name, path in sources().items() for one in found_in(path, name, known)]


def reached(module: str, edges: dict[str, set[str]]) -> set[str]:
    """Every module that edges lead to from this one."""
    seen: set[str] = set()
    ahead = {*edges.get(module, ())}
    while ahead:
        seen |= ahead
        ahead = {far for near in ahead for far in edges.get(near, ())} - seen
    return seen


@cache
def loaded(module: str) -> set[str]:
    """Heavy libraries that importing a module loads."""
    edges: dict[str, set[str]] = {}
    for one in imports():
        if not one.lazy and not one.typing:
            edges.setdefault(one.by, set()).add(one.module)
    return {far.partition(".")[0] for far in reached(module, edges)} & HEAVY


def contract_imports_neither_wing() -> list[object]:
    ground = [one for one in imports() if within(one.by, CONTRACT)]
    allowed = {"numpy", "pyarrow", "msgspec", *sys.stdlib_module_names}
    return [
        one
        for one in ground
        if not within(one.module, CONTRACT)
        and one.module.partition(".")[0] not in allowed | ({"scipy"} if one.lazy else set())
    ]


def capture_core_imports_the_contract_and_nothing_of_analysis() -> list[object]:
    core = [one for one in imports() if within(one.by, CAPTURE) and not within(one.by, APPS)]
    return [one for one in core if within(one.module, ANALYSIS, APPS)]


def only_apps_import_analysis_and_at_module_level() -> list[object]:
    return [
        one
        for one in imports()
        if within(one.by, CAPTURE)
        and within(one.module, ANALYSIS)
        and (one.lazy or not within(one.by, APPS))
    ]


def analysis_imports_the_contract_and_never_torch() -> list[object]:
    wing = [one for one in imports() if within(one.by, ANALYSIS)]
    of_capture = [one for one in wing if within(one.module, CAPTURE, "torch", "transformers")]
    return [one for one in of_capture if not within(one.module, CONTRACT)]


def no_import_by_a_name_that_can_be_shadowed() -> list[object]:
    return [one for one in imports() if within(one.module, "analysis", "capture", "sql", "tests")]


def no_circle_lazy_or_not() -> list[object]:
    edges = {by: {one.module for one in imports() if one.by == by} for by in sources()}
    return [by for by in edges if by in reached(by, edges)]


def a_lazy_import_has_a_heavy_library_as_its_reason() -> list[object]:
    """Of a module of ours: one that the importing module has not loaded already."""
    lazy = [one for one in imports() if one.lazy and one.module.partition(".")[0] not in HEAVY]
    return [one for one in lazy if not loaded(one.module) - loaded(one.by)]


def no_module_is_named_like_its_folder() -> list[object]:
    return [name for name in sources() if name.split(".")[-1] == name.split(".")[-2]]


def at_most_two_file_names_are_shared() -> list[object]:
    counts = Counter(path.name for path in sources().values() if path.name != "__init__.py")
    shared = sorted(name for name, n in counts.items() if n > 1)
    return [*shared] if len(shared) > 2 else []


def a_file_has_at_most_400_lines() -> list[object]:
    return [f"{name}: {n}" for name, n in lines().items() if n > 400]


def both_packages_hold_under_28_000_lines_of_code() -> list[object]:
    """Blank lines, comments and docstrings do not count."""
    total = sum(len(code_lines(path.read_text(encoding="utf-8"))) for path in sources().values())
    return [total] if total >= 28_000 else []


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {
        line
        for token in found
        if token.type not in blank and token.string
        for line in range(token.start[0], token.end[0] + 1)
    }
    return code - texts


def offline_tests_import_no_torch() -> list[object]:
    files = [
        p for f in ("analysis", "capture/contract") for p in (ROOT / "tests" / f).rglob("*.py")
    ]
    found = [one for path in files for one in found_in(path, path.name, set(sources()))]
    needs = [
        one
        for one in found
        if within(one.module, CAPTURE, "tests.capture", "tests.demo_model", "torch", "transformers")
    ]
    return [
        one
        for one in needs
        if not one.lazy and not within(one.module, CONTRACT, "tests.capture.contract")
    ]


@cache
def lines() -> dict[str, int]:
    return {n: len(p.read_text(encoding="utf-8").splitlines()) for n, p in sources().items()}


RULES = [
    contract_imports_neither_wing,
    capture_core_imports_the_contract_and_nothing_of_analysis,
    only_apps_import_analysis_and_at_module_level,
    analysis_imports_the_contract_and_never_torch,
    no_import_by_a_name_that_can_be_shadowed,
    no_circle_lazy_or_not,
    a_lazy_import_has_a_heavy_library_as_its_reason,
    no_module_is_named_like_its_folder,
    at_most_two_file_names_are_shared,
    a_file_has_at_most_400_lines,
    both_packages_hold_under_28_000_lines_of_code,
    offline_tests_import_no_torch,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rule(rule):
    broken = sorted(map(str, rule()))
    assert not broken, f"{len(broken)} times:\n" + "\n".join(broken)


def test_the_reader_sees_lazy_typing_and_relative_imports(tmp_path):
    (tmp_path / "b.py").write_text(
        "import x.y\nfrom . import c\nfrom .c import d\n"
        "if TYPE_CHECKING:\n    from ..e import f\n"
        "def g():\n    if True:\n        from x import y\n"
    )
    found = found_in(tmp_path / "b.py", "p.a.b", {"p.a.c", "p.e.f", "x.y"})
    assert found == [
        Import("p.a.b", "x.y", False, False),
        Import("p.a.b", "p.a.c", False, False),
        Import("p.a.b", "p.a.c", False, False),
        Import("p.a.b", "p.e.f", False, True),
        Import("p.a.b", "x.y", True, False),
    ]


if __name__ == "__main__":  # what breaks each rule today
    for rule in RULES:
        print(f"{rule.__name__}: {len(rule())}", *rule(), sep="\n  ")
