"""The tables of README.md and docs/benchmarks and the plots, made from the result files.

    python benchmarks/report.py

Each row of the table in docs/benchmarks is the newest measurement of its scenario. The README shows the newest run alone: one
machine, one commit. Plots need matplotlib.
"""

import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from results import load

ROOT = Path(__file__).resolve().parent.parent
FOLDER, README = ROOT / "docs" / "benchmarks", ROOT / "README.md"
PAGE = FOLDER / "README.md"
MARKS = "<!-- current: begin -->", "<!-- current: end -->"
SCENARIOS = {
    "8b": "8B Q4_K_M, decode",
    "f16": "Qwen2.5-Coder 1.5B F16, decode",
    "in-memory": "Qwen2.5-Coder 1.5B Q4_K_M, decode",
    "prefill": "8B Q4_K_M, prompt of 512 tokens",
    "70b": "70B Q4_K_M, decode",
}
IN_TURNS = {
    "decode": "1.5B Q4_K_M in memory, decode",
    "prompt": "1.5B Q4_K_M in memory, prompt of 500 tokens",
    "prompt-0.5b": "0.5B Q4_K_M in memory, prompt of 500 tokens",
    "start": "1.5B Q4_K_M, load and 8 tokens",
    "batch": "1.5B Q4_K_M, 16 chat prompts together",
    "8b-4000": "8B Q4_K_M, 4000 MiB, decode",
    "8b-4000-prompt": "8B Q4_K_M, 4000 MiB, prompt of 500 tokens",
    "f16-2000": "1.5B F16, 2000 MiB, decode",
    "f16-2000-prompt": "1.5B F16, 2000 MiB, prompt of 500 tokens",
    "experts-decode": "MoE of 12 layers in memory, decode",
    "experts-prompt": "MoE of 12 layers in memory, prompt of 500 tokens",
}


def newest() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """(run, row) by the row's name, from the newest run that has it."""
    return {row["row"]["name"]: (run, row) for run in load("peer") for row in run["results"] if not row.get("failed")}


def short_table() -> str:
    """The newest run beside its peer, in Markdown: one machine, one commit."""
    run = load("peer")[-1]
    lines = [
        f"{run['machine']}, a virtual disk of {run['results'][0]['disk_gb_per_s']:.1f} GB/s,"
        f" {run['date'][:10]}, commit `{run['commit']}`:",
        "",
        "| | `--memory` | headrace | llama.cpp | ratio | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in run["results"]:
        memory, ours, theirs = row["row"]["ceiling_mib"], row["s_per_token"], row["peer_s_per_token"]
        prefill = row["prefill_tok_per_s"]
        speeds = (
            [f"{prefill:.0f} tok/s", f"{1 / theirs:.0f} tok/s"]
            if prefill
            else [f"{ours:.2f} s/token", f"{theirs:.2f} s/token"]
        )
        cells = [
            SCENARIOS[re.sub(r"-\d+$", "", row["row"]["name"])],
            f"{memory} MiB" if memory else "all of it",
            *speeds,
            f"{row['ratio']:.1f}x" if row["ratio"] > 1.5 else f"{row['ratio']:.2f}x",
            f"{row['limit_s'] / ours:.0%}" if row["limit_s"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table() -> str:
    """The current table in Markdown."""
    lines = [
        "| scenario | `--memory` | headrace | limit | share of the limit | llama.cpp | ratio | predicted | machine | commit"
        " | time |",
        "|" + "---|" * 11,
    ]
    for name, (run, row) in newest().items():
        memory = row["row"]["ceiling_mib"]
        prefill = row["prefill_tok_per_s"]
        limit, ours = row["limit_s"], row["s_per_token"]
        cells = [
            SCENARIOS[re.sub(r"-\d+$", "", name)],
            f"{memory} MiB" if memory else "in memory",
            f"{prefill:.1f} tok/s" if prefill else f"{ours:.3f} s/token",
            f"{limit:.3f} s/token" if limit else "",
            f"{limit / ours:.0%}" if limit else "",
            f"{1 / row['peer_s_per_token']:.1f} tok/s" if prefill else f"{row['peer_s_per_token']:.2f} s/token",
            f"{row['ratio']:.2f}x",
            "" if row["prediction_error"] is None else f"{row['prediction_error']:+.0%}",
            run["machine"],
            f"`{run['commit']}`",
            run["date"].replace("T", " "),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_turns() -> str:
    """Every run in turns with an earlier commit, in Markdown."""
    lines = []
    for run in load("in-turns"):
        lines += [
            f"`{run['commit']}` beside `{run['before']}`, {run['machine']}, {run['date'].replace('T', ' ')}:",
            "",
            "| scenario | before | after | ratio of medians | single rounds | rounds |",
            "|---|---|---|---|---|---|",
            *(_in_turns_row(name, run["rows"][name]) for name in IN_TURNS if name in run["rows"]),
            "",
        ]
    return "\n".join(lines).rstrip()


def _in_turns_row(name: str, row: dict[str, list[float]]) -> str:
    before, after = (statistics.median(row[which]) for which in ("before", "after"))
    each = [b / a for a, b in zip(row["before"], row["after"], strict=True)]
    unit = "runs/s" if name == "start" else "tok/s"
    return (
        f"| {IN_TURNS[name]} | {before:.3g} {unit} | {after:.3g} {unit} | {after / before:.2f}x"
        f" | {min(each):.2f} to {max(each):.2f} | {len(each)} |"
    )


def page(text: str, content: str) -> str:
    """A page with this content between its marks."""
    begin, end = MARKS
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def pages() -> dict[Path, str]:
    """The text of every page that has tables of measurements."""
    return {
        PAGE: page(PAGE.read_text(), f"{table()}\n\n{in_turns()}"),
        README: page(README.read_text(), short_table()),
    }


def decode_points() -> Iterator[tuple[float, float, float, float, float]]:
    """(`--memory` in GB, seconds per token measured, the limit, the peer's, predicted) of the 8B, by memory."""
    found = [row for name, (_, row) in newest().items() if re.fullmatch(r"8b-\d+", name)]
    for row in sorted(found, key=lambda row: row["row"]["ceiling_mib"]):
        ours = row["s_per_token"]
        memory = row["row"]["ceiling_mib"] * (1 << 20) / 1e9
        yield memory, ours, row["limit_s"], row["peer_s_per_token"], ours * (1 + row["prediction_error"])


def plots() -> None:
    """Seconds per token over `--memory`, and predicted against measured."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "headrace", "axes.spines.top": False, "axes.spines.right": False})
    points = list(decode_points())
    if points:
        memory, ours, limit, theirs, _ = zip(*points, strict=True)
        figure, axis = pyplot.subplots(figsize=(6, 3.5))
        for values, label, style in ((theirs, "llama.cpp", "s-"), (ours, "headrace", "o-"), (limit, "limit", "k--")):
            axis.plot(memory, values, style, label=label)
        axis.set(xlabel="--memory (GB)", ylabel="seconds per token", ylim=(0, None))
        axis.legend(frameon=False)
        _save(figure, "seconds-per-token.svg")
    pairs = [
        (row["s_per_token"], row["s_per_token"] * (1 + row["prediction_error"]))
        for _, row in newest().values()
        if row["prediction_error"] is not None
    ]
    if pairs:
        _diagonal(pyplot, pairs)


def _diagonal(pyplot: Any, pairs: Sequence[tuple[float, float]]) -> None:
    measured, predicted = zip(*pairs, strict=True)
    figure, axis = pyplot.subplots(figsize=(4, 4))
    axis.loglog(measured, predicted, "o")
    ends = min(measured + predicted) / 1.3, max(measured + predicted) * 1.3
    axis.loglog(ends, ends, "k--", linewidth=0.8)
    axis.set(xlabel="measured (seconds per token)", ylabel="predicted (seconds per token)", xlim=ends, ylim=ends)
    _save(figure, "predicted-measured.svg")


def _save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / name, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    plots()
