"""The limits of the style, checked: sizes of functions, files and lines, unfinished marks."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 500
LINE_CHARS_MAX = 100
GENERATED = ("proto/kvasir_proto/v1/", "docs/api.md", "crds/", "helm/kvasir/crds/")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
VAGUE_NAMES = {"utils", "helpers", "common", "misc"}

EXCEPTIONS: set[str] = set()
"""Files over the limits that wait to be split. This set only shrinks."""


def tracked(*suffixes: str) -> list[Path]:
    """Files that git tracks, or would, with one of these suffixes; generated ones left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [
        ROOT / name
        for name in sorted(set(listed))
        if name.endswith(suffixes) and not name.startswith(GENERATED) and (ROOT / name).exists()
    ]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON = tracked(".py")
SOURCE = tracked(".py", ".cpp", ".h", ".proto", "Makefile", ".sh", "Dockerfile")


def test_there_are_sources_to_check() -> None:
    assert len(PYTHON) > 20


@pytest.mark.parametrize("path", SOURCE, ids=relative)
def test_file_keeps_the_limits(path: Path) -> None:
    lines = path.read_text().splitlines()
    if relative(path) not in EXCEPTIONS:
        assert len(lines) <= FILE_LINES_MAX, f"{len(lines)} lines: split it"
    if path.suffix in {".py", ".cpp", ".h"}:
        long = [n for n, line in enumerate(lines, 1) if len(line) > LINE_CHARS_MAX]
        assert not long, f"lines over {LINE_CHARS_MAX} characters: {long}"


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_functions_are_short(path: Path) -> None:
    long = [
        f"{node.name} at line {node.lineno}: {size} lines"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert not long


@pytest.mark.parametrize("path", SOURCE, ids=relative)
def test_nothing_is_left_unfinished(path: Path) -> None:
    if path == Path(__file__):
        return
    lines = path.read_text().splitlines()
    marks = [n for n, line in enumerate(lines, 1) if UNFINISHED.search(line)]
    assert not marks, f"unfinished marks in lines {marks}"


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_module_says_what_it_is(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES, "name it by what it holds"
    if path.name != "__init__.py" or path.read_text():
        assert ast.get_docstring(ast.parse(path.read_text())), "a module's docstring is missing"


def test_no_top_level_folder_is_a_package() -> None:
    """A package named `operator` at the root would hide Python's own module."""
    assert not [path for path in ROOT.glob("*/__init__.py") if not path.parts[-2].startswith(".")]
