"""Every architecture of the corpus, streamed, against transformers; and docs/architectures.md, which says how that went."""

import re
import sys
from pathlib import Path

import pytest
from corpus import CASES, tiny_model, write_folder
from parity import REFUSED, outcome_of, streamed

from headrace.errors import HeadraceError
from headrace.kernels import Kernels

DOCS = Path(__file__).parent.parent.parent / "docs"
sys.path.insert(0, str(DOCS))

from make_architectures import TARGET, refusals, row  # noqa: E402

PAGE = TARGET.read_text()


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    outcome = outcome_of(name, tmp_path / "model")
    # fp32 all the way; what differs is the order of sums, which experts and norms amplify to about 1e-5.
    assert outcome.divergence < 1e-3
    assert outcome.same
    assert row(name, outcome) in PAGE, "run `python docs/make_architectures.py`"


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_wrong_is_refused(name: str, tmp_path: Path) -> None:
    write_folder(tiny_model(name), tmp_path / "model")
    with pytest.raises(HeadraceError) as refusal:
        streamed(tmp_path / "model", Kernels(1))
    assert refusal.value.hint
    assert CASES[name].model_type in str(refusal.value)


def test_the_page_lists_what_is_tested_and_nothing_else() -> None:
    tables = PAGE.split("## Refused")
    listed = [set(re.findall(r"^\| ([a-z0-9_:-]+) \|", table, re.MULTILINE)) for table in tables]
    assert listed[0] == set(CASES) - set(REFUSED)
    assert PAGE.endswith("".join(refusals()))
