"""headrace beside llama.cpp: the same file, the same ceiling for the whole process, cold page cache, in turn.

    python benchmarks/run.py --models DIR --llama DIR [--rows decode-4000,...] [--rounds 3]
        [--out benchmarks/results/DATE-MACHINE-peer.json]

DIR of --models holds synth-8b-q4_k_m.gguf, synth-70b-q4_k_m.gguf and qwen2.5-coder-1.5b-f16.gguf; --llama is the folder
of llama-bench. Every round measures the disk, runs headrace, then the peer; medians are printed as a table and kept as
JSON with every round. Needs root, for the ceilings.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ceiling import run_under
from models import HOME
from results import provenance

from headrace.plan.profile import Profile, load_profile, save_profile
from headrace.probe import measure_disk, probe

MIB = 1 << 20
PROMPT = "The water wheel is one of the oldest"


@dataclass(frozen=True)
class Row:
    name: str
    file: str
    ceiling_mib: int | None
    tokens: int
    peer_tokens: int
    prompt_tokens: int = 0  # 0: decode of a short prompt


ROWS = (
    *(Row(f"8b-{memory}", "synth-8b-q4_k_m.gguf", memory, 12, 6) for memory in (2000, 3000, 4000, 5000)),
    Row("f16-2000", "qwen2.5-coder-1.5b-f16.gguf", 2000, 16, 8),
    Row("in-memory", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", None, 64, 64),
    Row("prefill-4000", "synth-8b-q4_k_m.gguf", 4000, 1, 0, prompt_tokens=512),
    Row("70b-20000", "synth-70b-q4_k_m.gguf", 20000, 11, 2),
)


def headrace(row: Row, path: Path) -> dict[str, Any]:
    """One run of headrace: values of its `--json`, and the cgroup's peak."""
    prompt = PROMPT if not row.prompt_tokens else "water " * (row.prompt_tokens - 1)
    command = [sys.executable, "-c", "from headrace.cli import main; main()", "run", str(path), prompt, "--raw"]
    command += ["-n", str(row.tokens), "-t", "0", "--json", "-q", "--draft", "none"]
    if row.ceiling_mib:
        command += ["--memory", f"{row.ceiling_mib}MiB"]
    result = run_under(row.ceiling_mib * MIB if row.ceiling_mib else None, command)
    if result.code:
        return {"failed": result.code, "stderr": result.stderr[-400:]}
    answer: dict[str, Any] = json.loads(result.stdout)
    timings, memory = answer["timings"], answer["memory"]
    plan = answer["plan"]
    return {
        "s_per_token": 1 / timings["decode_tok_per_s"] if timings["decode_tok_per_s"] else None,
        "ttft_s": timings["ttft_s"],
        "prefill_tok_per_s": answer["usage"]["prompt_tokens"] / timings["ttft_s"],
        "prefill_passes": timings["passes"] - answer["usage"]["completion_tokens"] + 1,
        "predicted_s": plan["decode_s_per_token"]["expected"],
        "streamed_bytes": memory["streamed_bytes_per_pass"],
        "pinned_bytes": memory["pinned_bytes"],
        "other_bytes": memory["peak_bytes"]
        - sum(memory[key] for key in ("pinned_bytes", "repacked_bytes", "kv_bytes")),
        "peak_bytes": memory["peak_bytes"],
        "cgroup_peak_bytes": result.peak_bytes,
        "binding": plan["binding"],
        "stall_s": timings["stall_s"],
    }


def peer(row: Row, path: Path, llama: Path) -> dict[str, Any]:
    """One run of llama-bench, file-mapped, without repacking."""
    command = [str(llama / "llama-bench"), "-m", str(path), "-t", str(len(os.sched_getaffinity(0)))]
    command += ["-p", str(row.prompt_tokens), "-n", str(row.peer_tokens)]
    command += ["-r", "1", "-lm", "mmap", "--repack", "0", "-o", "json"]
    if row.ceiling_mib:  # without a ceiling, warm-up keeps the peer's file reads out of its speed
        command.append("--no-warmup")
    result = run_under(row.ceiling_mib * MIB if row.ceiling_mib else None, command)
    if result.code:
        return {"failed": result.code}
    return {"tok_per_s": json.loads(result.stdout)[0]["avg_ts"]}


def measure(row: Row, path: Path, llama: Path, rounds: int, profile: Profile) -> dict[str, Any]:
    """All rounds of a row, and their medians."""
    device = str(path.stat().st_dev)
    kept: list[dict[str, Any]] = []
    for number in range(rounds):
        disks = [measure_disk(path)]
        save_profile(replace(profile, disk_bytes_per_s={device: disks[0]}))
        ours = headrace(row, path)
        disks.append(measure_disk(path))
        theirs = peer(row, path, llama)
        kept.append({"ours": ours, "peer": theirs, "disk_bytes_per_s": statistics.mean(disks), "disks": disks})
        print(f"{row.name} {number + 1}/{rounds}: {json.dumps(kept[-1])}", file=sys.stderr, flush=True)
    return {"row": vars(row), "rounds": kept, **_summary(row, kept, profile, path)}


def _summary(row: Row, kept: list[dict[str, Any]], profile: Profile, path: Path) -> dict[str, Any]:
    good = [k for k in kept if "failed" not in k["ours"]]
    if not good:
        return {"failed": True}

    def median(value: Callable[[dict[str, Any]], float | None]) -> float | None:
        values = [v for v in (value(k) for k in good) if v is not None]
        return statistics.median(values) if values else None

    def peer_s(k: dict[str, Any]) -> float | None:
        return 1 / k["peer"]["tok_per_s"] if k["peer"].get("tok_per_s") else None

    compute = compute_limit(path, profile)

    def limit(k: dict[str, Any]) -> float:
        return max(float(k["ours"]["streamed_bytes"]) / float(k["disk_bytes_per_s"]), compute)

    prefill = bool(row.prompt_tokens)

    def ratio(k: dict[str, Any]) -> float | None:
        theirs = peer_s(k)
        if theirs is None:
            return None
        mine = 1 / float(k["ours"]["prefill_tok_per_s"]) if prefill else float(k["ours"]["s_per_token"])
        return theirs / mine

    return {
        "s_per_token": median(lambda k: k["ours"]["s_per_token"]),
        "prefill_tok_per_s": median(lambda k: k["ours"]["prefill_tok_per_s"]) if prefill else None,
        "peer_s_per_token": median(peer_s),
        "ratio": median(ratio),
        "limit_s": None if prefill else median(limit),
        "over_limit": None if prefill else median(lambda k: k["ours"]["s_per_token"] / limit(k)),
        "prediction_error": None
        if prefill
        else median(lambda k: k["ours"]["predicted_s"] / k["ours"]["s_per_token"] - 1),
        "other_mib": median(lambda k: k["ours"]["other_bytes"] / MIB),
        "peak_mib": max(k["ours"]["peak_bytes"] for k in good) / MIB,
        "disk_gb_per_s": median(lambda k: k["disk_bytes_per_s"] / 1e9),
    }


def compute_limit(path: Path, profile: Profile) -> float:
    """Seconds of the kernels for one row, by the probe's rates."""
    from headrace.checkpoint import open_checkpoint
    from headrace.plan.shape import is_linear

    checkpoint = open_checkpoint(path)
    linears = [t for t in checkpoint.tensors.values() if is_linear(t)]
    if "output.weight" not in checkpoint.tensors:
        linears.append(checkpoint.tensors["token_embd.weight"])
    return sum(t.rows * t.columns / profile.kernel(t.type, 1) for t in linears)


def table(results: list[dict[str, Any]]) -> str:
    """The medians as Markdown."""
    head = "| row | ours | peer | ratio | limit | ours/limit | predicted | other memory | peak | disk |"
    lines = [head, "|" + "---|" * 10]

    def text(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    for r in results:
        if r.get("failed"):
            lines.append(f"| {r['row']['name']} | failed |" + " |" * 8)
            continue
        prefill = r["prefill_tok_per_s"]
        ours = text(prefill, "{:.1f} tok/s") if prefill else text(r["s_per_token"], "{:.3f} s")
        theirs = r["peer_s_per_token"]
        peer_text = (
            text(1 / theirs if theirs and prefill else None, "{:.1f} tok/s") if prefill else text(theirs, "{:.3f} s")
        )
        cells = [
            r["row"]["name"], ours, peer_text, text(r["ratio"], "{:.2f}x"), text(r["limit_s"], "{:.3f} s"),
            text(r["over_limit"], "{:.2f}"), text(r["prediction_error"], "{:+.0%}"), text(r["other_mib"], "{:.0f} MiB"),
            text(r["peak_mib"], "{:.0f} MiB"), text(r["disk_gb_per_s"], "{:.2f} GB/s"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HOME)
    parser.add_argument("--llama", type=Path, default=Path.home() / ".cache/headrace/llama.cpp/bin")
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    arguments = parser.parse_args()
    wanted = arguments.rows.split(",")
    rows = [row for row in ROWS if row.name in wanted]
    paths = {
        row.name: next((d / row.file for d in (arguments.models, HOME) if (d / row.file).exists()), None)
        for row in rows
    }
    missing = [row.file for row in rows if paths[row.name] is None]
    if missing or not (arguments.llama / "llama-bench").exists():
        sys.exit(
            f"Error: missing: {', '.join(missing) or arguments.llama / 'llama-bench'} (see docs/benchmarks/README.md)"
        )
    os.environ["HEADRACE_HOME"] = str(arguments.out.resolve().parent / "benchmark-profile")
    first = next(p for p in paths.values() if p is not None)
    profile = load_profile() or probe(first)
    save_profile(profile)
    subprocess.run(["lscpu"], stdout=sys.stderr, check=False)
    results = []
    for row in rows:
        path = paths[row.name]
        assert path is not None
        results.append(measure(row, path, arguments.llama, arguments.rounds, profile))
        arguments.out.write_text(
            json.dumps({**provenance(), "profile": vars(profile), "results": results}, indent=1, default=dict)
        )
    print(table(results))


if __name__ == "__main__":
    main()
