"""Generated documents are up to date, and links in pages lead to existing files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_is_what_the_commands_say() -> None:
    from make_reference import TARGET, reference

    assert TARGET.read_text() == reference(), "run `python docs/make_reference.py`"


def test_the_tables_of_measurements_are_made_from_the_result_files() -> None:
    from report import pages

    for path, text in pages().items():
        assert path.read_text() == text, "run `python benchmarks/report.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
