"""Imports go one way, and what plans or reads headers never waits for torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "headrace"
# Each group may import the groups before it and itself; modules of one group may import each other.
ORDER = [
    {"_version", "errors", "units", "cgroup", "text", "paths", "limits", "bounded", "process", "sampling_params", "torch_compat"},
    {"checkpoint"},
    {"hub", "request_fields", "batch"},
    {"kernels"},
    {"forecast"},
    {"claims", "plan"},
    {"stream"},
    {"model"},
    {"engine"},
    {"completion"},
    {"api", "async_llm"},
    {"slim_import", "probe"},
    {"cli"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imported(path: Path) -> Iterator[str]:
    """Our packages that a file imports, but for those that only type checkers see."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headrace."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "headrace":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("headrace."))


FILES = sorted(
    path for path in SOURCE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py") or path.parent != SOURCE
)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no place in the order"
    later = {name for name in imported(path) if LEVEL.get(name, -1) > LEVEL[own]}
    assert not later, f"{own} comes before {later}"


def test_planning_and_headers_do_not_import_torch() -> None:
    program = (
        "import sys, headrace, headrace.checkpoint, headrace.hub.download, headrace.plan, headrace.forecast.predict,"
        " headrace.batch, headrace.cli; headrace.cli.main.list_commands(None);"
        " print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
