"""Score the planner against measurements that it has not seen, write docs/accuracy.md, and keep the constants fitted to all.

    python benchmarks/accuracy.py                    # all of data/, writes the page and src/headrace/forecast/data/constants.toml
    python benchmarks/accuracy.py --data more.csv    # scores other rows of the same columns with the constants as
    they are; writes nothing

Every published row is predicted by constants fitted without its source; the engine's own runs by factors fitted to the
other half of the models. An interval comes from the errors on other sources.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path

from calibrate import fit_families, leave_one_source_out
from measurements import DATA, Case, read_cases
from streamed import Streamed, fit_feed, read_streamed

from headrace.forecast.constants import load_constants
from headrace.forecast.passes import Rates
from headrace.forecast.streaming import FeedRates
from headrace.plan.fit import fit_runs, pass_seconds, quantile
from headrace.plan.record import RunRecord, read_records

ROOT = Path(__file__).parent.parent
PUBLISHED, MORE = DATA / "measured_inference.csv", DATA / "more_measurements.csv"
RUNS = DATA / "engine_runs.jsonl"
FEED_PRIORS = {"dense streaming": 3e-4, "MoE streaming": 1.5e-3}  # seconds per layer of engines written for it


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A row with its prediction; `interval` takes its error interval from other sources' errors."""

    id: str
    source: str
    category: str
    group: str  # rows of a group are ranked against each other
    tok_per_s: float
    measured: float
    predicted: float
    given: bool  # True: a row of measured_inference.csv

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def log_ratio(self) -> float:
        """Logarithm of measured over predicted."""
        return math.log(self.measured / self.predicted)


def broad(category: str) -> str:
    """The categories of the table of targets."""
    return "tensor parallel" if category.startswith("tensor parallel") else category


def score_all() -> tuple[list[Scored], dict[str, Rates], dict[str, tuple[FeedRates, Rates]]]:
    """All rows, each predicted without its source; and the constants fitted to all of them."""
    scored: list[Scored] = []
    given = {case.id for case in read_cases(PUBLISHED)} | {case.id for case in read_streamed(PUBLISHED)}
    cases = read_cases(PUBLISHED) + read_cases(MORE)
    rates = fit_families(cases)
    predicted = leave_one_source_out(cases, rates, lambda source: print(source, file=sys.stderr))
    scored += [_scored(case, predicted[case.id], case.id in given) for case in cases]
    feeds = {}
    streamed = read_streamed(PUBLISHED) + read_streamed(MORE)
    for category, layer_s in FEED_PRIORS.items():
        start = replace(Rates(), layer_s=layer_s)
        rows = [case for case in streamed if case.category == category]
        feeds[category] = fit_feed(rows, start)
        for source in sorted({case.source for case in rows}):
            feed, own = fit_feed([case for case in rows if case.source != source], start)
            scored += [
                _scored(case, case.predict(own, feed), case.id in given) for case in rows if case.source == source
            ]
    return scored, rates, feeds


def _scored(case: Case | Streamed, predicted: float, given: bool) -> Scored:
    batch = case.batch if isinstance(case, Case) else case.work.sequences
    passes = case.parts if isinstance(case, Case) else (float(case.prompt > 0), case.passes)
    prompt = case.prompt
    tokens = batch * (passes[1] if passes[1] else prompt)
    return Scored(
        id=case.id,
        source=case.source,
        category=broad(case.category),
        group=f"{case.source}|{passes[1] > 0}|{passes[0] > 0}",
        tok_per_s=tokens / case.seconds,
        measured=case.seconds / max(tokens, 1),
        predicted=predicted / max(tokens, 1),
        given=given,
    )


def interval(row: Scored, rows: Sequence[Scored], share: float = 0.8) -> tuple[float, float]:
    """The middle share of measured / predicted on other sources of the category, every source with the same weight."""
    # Errors on sparsely described rows are the rows' as much as the planner's: complete rows are compared among
    # themselves.
    alike = [other for other in rows if other.source != row.source and (other.given or not row.given)]
    others = [other for other in alike if other.category == row.category]
    if len(others) < 8:
        others = alike
    return weighted_interval(others, share)


def weighted_interval(rows: Sequence[Scored], share: float) -> tuple[float, float]:
    count: dict[str, int] = {}
    for row in rows:
        count[row.source] = count.get(row.source, 0) + 1
    ordered = sorted((row.log_ratio, count[row.source] ** -0.5) for row in rows)
    total = sum(weight for _, weight in ordered)
    ends = []
    for wanted in ((1 - share) / 2, (1 + share) / 2):
        reached = 0.0
        for value, weight in ordered:
            reached += weight
            if reached >= wanted * total:
                ends.append(math.exp(value))
                break
    return ends[0], ends[1]


def ranking(rows: Sequence[Scored]) -> tuple[int, int]:
    """(pairs in the right order, all pairs) of a source's configurations, ordered by tokens per second."""
    right = pairs = 0
    for group in {row.group for row in rows}:
        for a, b in combinations([row for row in rows if row.group == group], 2):
            if a.measured == b.measured:
                continue
            pairs += 1
            right += (a.measured < b.measured) == (a.predicted < b.predicted)
    return right, pairs


def summary(rows: Sequence[Scored], everything: Sequence[Scored]) -> dict[str, float]:
    errors = sorted(abs(row.error) for row in rows)
    held = sum(low <= row.measured / row.predicted <= high for row in rows for low, high in [interval(row, everything)])
    right, pairs = ranking(rows)
    return {
        "rows": len(rows),
        "sources": len({row.source for row in rows}),
        "mape": statistics.mean(errors),
        "median": statistics.median(errors),
        "bias": statistics.mean(row.error for row in rows),
        "worst": errors[-1],
        "held": held / len(rows),
        "ranked": right / pairs if pairs else math.nan,
        "pairs": pairs,
    }


def table(title: str, groups: Mapping[str, Sequence[Scored]], everything: Sequence[Scored]) -> list[str]:
    lines = [
        f"| {title} | rows | sources | MAPE | median | bias | worst | 80 % interval holds | pairs in the right order |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, rows in groups.items():
        if not rows:
            continue
        s = summary(rows, everything)
        ranked = "" if math.isnan(s["ranked"]) else f"{s['ranked']:.0%} of {s['pairs']:.0f}"
        lines.append(
            f"| {name} | {s['rows']:.0f} | {s['sources']:.0f} | {s['mape']:.1%} | {s['median']:.1%} | {s['bias']:+.1%} |"
            f" {s['worst']:.0%} | {s['held']:.0%} | {ranked} |"
        )
    return lines


WHY = (
    (
        r"FlexGen\(c\)",
        "unpacks by separate operations; the bytes they move are learnt from one other page, of larger models",
    ),
    (
        r"l15013_(RTX|DGX).*_pre",
        "multiplies packed weights in 8-bit integers, at another rate than the table's 16-bit one",
    ),
    (
        "zi_ZeRO-Inference_w\\d+_kvyes_Llama",
        "the engine keeps the keys of all 64 heads, or reads them several times; ours counts the model's 8",
    ),
    ("zi_FlexGen_w16_kvyes_OPT-175B", "FlexGen read this disk at 2 GB/s, a third of what the page states for it"),
    ("Accelerate", "copies from memory that is not pinned, at 4 to 6 GB/s whatever the bus"),
    (
        "b480_128_2048|b240_128_2048|b64_2048_2048",
        "many long conversations of a model with shared keys: this version's attention does not share them",
    ),
    ("H10080GB|A10080GB", "llama.cpp's kernels for packed weights do not fill memory stacks of this width"),
    ("xd_.*pp512", "prefill of builds before the kernels for matrix units"),
    ("(?i)mixtral|oss|qwen3.*a3b|spark", "choosing and gathering experts costs some engines much more than others"),
    ("sequoia", "an engine written for this one case; the constants are those of general ones"),
    ("CLBl|clbl|Vulka|ROCm|RX_", "an early version of this backend"),
    ("ik_pr121", "two threads do not draw the memory's bandwidth"),
    ("mixoff", "experts unpacked by a chain of operations, on notebooks and shared machines"),
    ("flashmoe_cuda_2080", "its disk is slower than the page of the port says"),
    ("bloom_accelerate", "launches one by one, through hooks"),
)


def why(id: str) -> str:
    import re

    return next((text for pattern, text in WHY if re.search(pattern, id)), "no cause known")


def engine_scores(records: Sequence[RunRecord]) -> tuple[list[tuple[str, float]], list[str]]:
    """(run, error) by factors fitted to the other half of the models, and lines with those factors."""
    models = sorted({record.model + str(record.weights_bytes) for record in records})
    halves = [{m for i, m in enumerate(models) if i % 2 == side} for side in (0, 1)]
    found: list[tuple[str, float]] = []
    lines = []
    for side, held in enumerate(halves):
        rest = [r for r in records if r.model + str(r.weights_bytes) not in held]
        fit = fit_runs(rest, rest[0].machine)
        text = ", ".join(f"{name} {value:.2f}" for name, value in fit.factors.items())
        lines.append(f"- half {side + 1}: factors from {fit.runs} runs of the other models: {text}")
        for record in records:
            if record.model + str(record.weights_bytes) not in held:
                continue
            # One row per run: its passes together, weighted by their number.
            measured = sum(g.count * (g.seconds + g.draft_s) for g in record.passes)
            predicted = sum(g.count * (pass_seconds(record, g, fit.factors) + g.draft_s) for g in record.passes)
            name = (
                f"{record.model}, {record.weights_bytes / 1e9:.2f} GB at {record.budget_bytes >> 20} MiB, "
                f"{record.sequences} sequences, draft {record.draft}"
            )
            found.append((name, predicted / measured - 1))
    return found, lines


def choices(records: Sequence[RunRecord]) -> list[str]:
    """The plan's choice and the best, for every model and ceiling that was run with several configurations."""
    runs_by_key: dict[tuple[str, int, int, str], list[RunRecord]] = {}
    for record in records:
        if record.s_per_token is not None:
            key = (record.model, record.weights_bytes, record.budget_bytes)
            runs_by_key.setdefault((*key, "sequences and drafts"), []).append(record)
            if record.sequences == 1:
                runs_by_key.setdefault((*key, "drafts"), []).append(record)
    lines, regrets = [], []
    for (model, weights, budget, _), group in runs_by_key.items():
        if len(group) < 2:
            continue
        chosen = min(group, key=lambda r: r.predicted_s_per_token)
        best = min(group, key=lambda r: r.s_per_token or math.inf)
        assert chosen.s_per_token is not None
        assert best.s_per_token is not None
        regrets.append(chosen.s_per_token / best.s_per_token - 1)
        names = [f"{r.sequences} sequences, draft {r.draft}" for r in (chosen, best)]
        lines.append(
            f"| {model}, {weights / 1e9:.2f} GB at {budget >> 20} MiB | {len(group)} | {names[0]} | {names[1]} | "
            f"{regrets[-1]:.1%} |"
        )
    if not lines:
        return []
    worst = max(regrets)
    head = (
        "Of several ways to run a model under a ceiling, the planner's choice against the best of all that "
        f"were tried: {statistics.mean(regrets):.1%} slower on average, {worst:.1%} at worst (asked: 5 %)."
    )
    return ["", head, "", "| model and ceiling | ways | chosen | best | slower by |", "|---|--:|---|---|--:|", *lines]


def page(scored: Sequence[Scored], rates: Mapping[str, Rates], records: Sequence[RunRecord]) -> str:
    given = [row for row in scored if row.given]
    by_category = {
        c: [r for r in given if r.category == c]
        for c in ("decode", "request", "prefill", "tensor parallel", "dense streaming", "MoE streaming")
    }
    lines = [
        "# How accurate the planner is",
        "",
        "Made by `make accuracy`; every number below is of rows that the constants had not seen. What the "
        "constants stand for was chosen with these scores in view: "
        "which terms (of four tried), which families of software, which of six ways to weigh errors into an "
        "interval. New rows may well score worse.",
        "",
        "Rows that do not say enough are left out: streamed ones without a batch or a rate, weights that are "
        "gathered or cannot all be there. For experts the hit rate is the page's own where it gives one.",
        "",
    ]
    lines += [
        "## Published measurements, each predicted without its source",
        "",
        *table("`data/measured_inference.csv`", by_category | {"all": given}, scored),
        "",
    ]
    lines += [
        "Asked for: resident decode 12 %, tensor parallel 20 %, dense streaming 25 %, MoE streaming 30 %; "
        "intervals that hold 75 to 85 %; 90 % of pairs.",
        "Bandwidth alone, with neither efficiency nor fixed time, is off by 29.6 % for resident decode.",
        "",
    ]
    more = {c: [r for r in scored if r.category == c] for c in by_category}
    lines += [
        "With the rows of `data/more_measurements.csv` (of many machines and authors, with less said about each):",
        "",
        *table("all rows", more | {"all": list(scored)}, scored),
        "",
    ]
    sources = {s: [r for r in given if r.source == s] for s in sorted({r.source for r in given})}
    lines += [
        "### By source",
        "",
        *table("source", sources, scored),
        "",
        "### The worst rows, and why",
        "",
        "| row | measured / predicted | why |",
        "|---|--:|---|",
    ]
    worst = sorted(given, key=lambda row: -abs(row.log_ratio))[:20]
    lines += [f"| {row.id} | {row.measured / row.predicted:.2f} | {why(row.id)} |" for row in worst]
    if records:
        found, notes = engine_scores(records)
        errors = sorted(abs(error) for _, error in found)
        within = sum(error < 0.2 for error in errors) / len(errors)
        lines += [
            "",
            "## The engine's own runs",
            "",
            f"{len(records)} runs on {records[0].machine}; factors fitted to half of the models, scored on the other half:",
            "",
            *notes,
            "",
        ]
        lines += [
            f"Median error {quantile(errors, 0.5):.1%} (asked: 7 %), {within:.0%} of the runs within 20 % (asked: "
            f"90 %), worst {errors[-1]:.0%}.",
            "",
        ]
        lines += [*choices(records), ""]
        lines += [
            "| run | predicted / measured |",
            "|---|--:|",
            *(f"| {name} | {1 + error:.2f} |" for name, error in found),
        ]
    lines += [
        "",
        "## The constants",
        "",
        "Fitted to everything, and used by `headrace plan --machine`:",
        "",
        "| family | " + " | ".join(f.name for f in fields(Rates)) + " |",
        "|---|" + "--:|" * len(fields(Rates)),
    ]
    lines += [
        f"| {family} | " + " | ".join(f"{getattr(r, f.name):.3g}" for f in fields(Rates)) + " |"
        for family, r in sorted(rates.items())
    ]
    return "\n".join(lines) + "\n"


def constants(
    scored: Sequence[Scored], rates: Mapping[str, Rates], feeds: Mapping[str, tuple[FeedRates, Rates]]
) -> str:
    """The fitted constants as TOML."""
    lines = [
        "# Made by `make accuracy` from benchmarks/data. Rates: seconds and shares (forecast/passes.py). "
        "Spread: measured / predicted",
        "# of the middle 80 % on sources that were left out, by category.",
        "",
    ]
    for family, found in sorted(rates.items()):
        lines += [f'[rates."{family}"]', *(f"{f.name} = {getattr(found, f.name):.6g}" for f in fields(Rates)), ""]
    for category, (feed, own) in feeds.items():
        lines += [
            f'[feed."{category}"]',
            *(f"{f.name} = {getattr(feed, f.name):.6g}" for f in fields(FeedRates)),
            f"layer_s = {own.layer_s:.6g}",
            f"chain_bytes = {own.chain_bytes:.6g}",
            "",
        ]
    lines.append("[spread]")
    for category in sorted({row.category for row in scored}):
        rows = [row for row in scored if row.category == category and row.given]
        low, high = weighted_interval(rows, 0.8)
        lines.append(
            f'"{category}" = {{ low = {low:.4f}, high = {high:.4f}, rows = {len(rows)}, sources = '
            f"{len({row.source for row in rows})} }}"
        )
    return "\n".join(lines) + "\n"


def score_others(path: Path) -> list[Scored]:
    """Score rows of another file with the constants that headrace ships."""
    known = load_constants()
    scored = [_scored(case, case.predict(known.rates_of(case.family)), True) for case in read_cases(path)]
    for case in read_streamed(path, known=False):
        feed, own = known.feed_of(case.category)
        scored.append(_scored(case, case.predict(own, feed), True))
    return scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="Other measurements, as CSV with the columns of measured_inference.csv."
    )
    arguments = parser.parse_args()
    if arguments.data:
        rows = score_others(arguments.data)
        groups = {c: [r for r in rows if r.category == c] for c in sorted({r.category for r in rows})}
        spread = load_constants().spread
        print(f"{len(rows)} rows say enough to be predicted")
        for name, group in groups.items():
            errors = sorted(abs(r.error) for r in group)
            low, high = spread.get(name, (0.5, 2.0))
            held = sum(low <= r.measured / r.predicted <= high for r in group) / len(group)
            right, pairs = ranking(group)
            print(
                f"{name}: {len(group)} rows, MAPE {statistics.mean(errors):.1%}, median "
                f"{statistics.median(errors):.1%}, interval holds {held:.0%}, pairs {right}/{pairs}"
            )
        for row in sorted(rows, key=lambda r: -abs(r.log_ratio))[:15]:
            print(f"  {row.id}: measured / predicted {row.measured / row.predicted:.2f}")
        return
    scored, rates, feeds = score_all()
    records = read_records(RUNS) if RUNS.exists() else []
    (ROOT / "docs" / "accuracy.md").write_text(page(scored, rates, records))
    (ROOT / "src/headrace/forecast/data/constants.toml").write_text(constants(scored, rates, feeds))
    given = [row for row in scored if row.given]
    groups = {c: [r for r in given if r.category == c] for c in sorted({r.category for r in given})}
    print("\n".join(table("category", groups | {"all": given}, scored)))


if __name__ == "__main__":
    main()
