"""The code and its docs speak the field's language: the words that were replaced do not come back (ARCHITECTURE.md, glossary)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What was said, and what is said now. Where a word has a meaning of its own elsewhere, the folders that are looked at.
OLD_WORDS = {
    r"guess|guesses|(?<![\"`])guessed(?![\"`])|guessing": "draft token; assumed, estimated",  # but the label of an input
    r"grades?": "confidence bucket",
    r"tapes?|taken down|play(s|ed)? back": "captured step, captured, replayed",
    r"spoil(s|t|ed)?": "mark uncapturable",
    r"woven|weave": "repacked",
    r"slabs?": "K-split",
    r"lend(s|ing)?|lent": "decode-pinned rows; prefill memory reused during decode",
    r"donors?": "prefix source",
    r"begin(s)? alike": "common prefix",
    r"beginning": "prefix, start",
    r"of its own": "own, separate",
    r"shell": "model skeleton; terminal",
    r"cuts": "chunk boundaries, pre-tokenizers, splits",
    r"rooms?": "package, buffer, free bytes, context left",
    r"foreseen|strays": "predicted, prefetched",
    r"read ahead|reads ahead|reading ahead|look(s|ing)? ahead": "prefetch",
    r"homeless": "unexpected tensors",
    r"outlook": "prediction",
    r"trunk": "dense weights",
    r"mixtures?(?! of experts)": "MoE",
    r"so many": "name the quantity",
    r"exact rows|rows that are exact": "row-invariant rows",
    r"few rows|many rows": "decode rows, prefill rows",
    r"numbers kept": "KV elements per token",
    r"(?<!multi-head )latent attention": "MLA",
    r"keys and values are turned|turning of|turns queries": "RoPE",
    r"ways to run attention|in its own way": "attention mode",
    r"the model's own cache": "native cache",
    r"companions?": "scale or zero-point tensor",
    r"first light": "initial",
}
IN_FOLDERS = {
    r"pieces?": ("weight slice", ("engine", "kernels", "stream")),
    r"interleav\w+": ("repacked", ("engine", "kernels", "stream", "plan")),
    r"(?<!dot )products?": ("matmul", ("engine", "kernels", "stream", "plan")),
    r"chains?": ("fused graph", ("engine", "kernels")),
    r"answers?": ("sequence, output", ("engine", "stream", "kernels")),
    r"visits?": ("weight group", ("stream", "engine")),
    r"opening": ("decoder start, prefill-only", ("engine", "stream", "plan")),
    r"turned|turns": ("RoPE, transposed", ("engine", "kernels")),
}
# Beginnings that hide the subject of a sentence.
VAGUE_BEGINNINGS = ("Of ", "What ", "Those ", "That ", "Whether ", "Such ", "So ")
PYTHON = sorted(path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
DOCS = sorted((*ROOT.glob("*.md"), *(path for path in (ROOT / "docs").rglob("*.md") if path.name != "history.md")))
HISTORY = {"CHANGELOG.md"}


def found(text: str, words: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for match in re.finditer(rf"(?<![\w-])(?:{words})(?![\w-])", line, re.IGNORECASE):
            yield f"{number}: `{match[0]}` in {line.strip():.100}"


@pytest.mark.parametrize("words", OLD_WORDS)
def test_words_that_were_replaced_stay_away(words: str) -> None:
    files = [path for path in (*PYTHON, *DOCS) if path.name not in {"test_language.py", *HISTORY}]
    hits = [f"{path.relative_to(ROOT)}:{hit}" for path in files for hit in found(path.read_text(), words)]
    assert not hits, f"say {OLD_WORDS[words]}:\n" + "\n".join(hits[:40])


@pytest.mark.parametrize("words", IN_FOLDERS)
def test_words_that_mean_something_else_elsewhere_stay_away(words: str) -> None:
    instead, folders = IN_FOLDERS[words]
    files = [path for path in PYTHON if path.parent.name in folders]
    hits = [f"{path.relative_to(ROOT)}:{hit}" for path in files for hit in found(path.read_text(), words)]
    assert not hits, f"say {instead}:\n" + "\n".join(hits[:40])


def test_a_docstring_begins_with_its_subject_or_verb() -> None:
    vague = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {text:.60}"
        for path in PYTHON
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        for text in [ast.get_docstring(node) or ""]
        if text.startswith(VAGUE_BEGINNINGS)
    ]
    assert not vague, "\n".join(vague[:40])


def test_classes_and_modules_have_names_of_their_own() -> None:
    classes: dict[str, list[str]] = {}
    modules: dict[str, list[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name != "cli":  # a command has the name of what it shows
            modules.setdefault(path.name, []).append(str(path.parent.name))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes.setdefault(node.name, []).append(path.name)
    twice = {name: places for name, places in (classes | modules).items() if len(places) > 1}
    assert twice.keys() <= {"errors.py"}, twice
