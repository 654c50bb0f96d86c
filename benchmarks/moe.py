"""A MoE model larger than memory: headrace beside llama.cpp, the same file, prompt and ceiling, cold, in turn.

    python benchmarks/moe.py [--model FILE] [--llama DIR] [--ceiling 6000] [--tokens 48] [--rounds 3] [--out moe.json]

FILE is by default synth-30b-a3b-q4_k_m.gguf, which benchmarks/synthetic.py writes. The peer is llama-completion from the folder
--llama, file-mapped, without repacking and warm-up. Routing depends on the tokens, so both continue the same prompt greedily.
With random weights, rounding soon makes the tokens differ, but not their distribution.
--bench adds llama-bench, whose tokens are random. Both count decoding after the first token. Needs root.

    seconds per token = max(M / B, C)        M bytes missed per token, B disk bytes/s, C the kernels' seconds per token

M is what headrace read per token after the prompt, B the probe's stream before and after its run. C is its time per token minus
the time stalled on the disk; it includes the CPU cost of I/O (`together.py` measures that).
"""

import argparse
import json
import os
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ceiling import run_under
from models import HOME

from headrace.plan.profile import Profile, load_profile, save_profile
from headrace.probe import measure_disk, probe

MIB = 1 << 20
PROMPT = "The water wheel is one of the oldest"


def headrace(path: Path, ceiling_mib: int, tokens: int) -> dict[str, Any]:
    """One run of headrace. `experts` is empty if the engine does not report them."""
    command = [sys.executable, "-c", "from headrace.cli import main; main()", "run", str(path), PROMPT, "--raw", "-q"]
    command += ["-n", str(tokens), "-t", "0", "--json", "--draft", "none", "--memory", f"{ceiling_mib}MiB"]
    result = run_under(ceiling_mib * MIB, command)
    if result.code:
        return {"failed": result.code, "stderr": result.stderr[-400:]}
    answer: dict[str, Any] = json.loads(result.stdout)
    timings, experts = answer["timings"], answer.get("experts") or {}
    return {
        "text": answer["text"],
        "tokens": answer["usage"]["completion_tokens"],
        "s_per_token": 1 / timings["decode_tok_per_s"] if timings.get("decode_tok_per_s") else None,
        "ttft_s": timings["ttft_s"],
        "missed_bytes": experts.get("bytes_per_token", timings.get("read_bytes_per_pass")),
        "stall_s": timings["decode_stall_s"] / max(1, answer["usage"]["completion_tokens"] - 1),
        "predicted_s": answer["plan"]["decode_s_per_token"]["expected"],
        "experts": experts,
        "own_peak_bytes": answer["memory"]["peak_bytes"],
        "cgroup_peak_bytes": result.peak_bytes,
    }


def completion(path: Path, llama: Path, ceiling_mib: int, tokens: int) -> dict[str, Any]:
    """One run of llama-completion with the same prompt."""
    command = [str(llama / "llama-completion"), "-m", str(path), "-t", str(len(os.sched_getaffinity(0)))]
    command += ["-p", PROMPT, "-n", str(tokens), "--temp", "0", "--ignore-eos", "-c", "512", "-fit", "off", "-no-cnv"]
    command += ["-lm", "mmap", "-nr", "--no-warmup", "--perf", "--no-display-prompt"]
    result = run_under(ceiling_mib * MIB, command)
    if result.code:
        return {"failed": result.code, "stderr": result.stderr[-400:]}
    return {"text": result.stdout, **read_timings(result.stderr), "cgroup_peak_bytes": result.peak_bytes}


def read_timings(text: str) -> dict[str, float]:
    """TTFT and seconds per token from llama.cpp's final lines."""
    prompt = re.search(r"prompt eval time = +([\d.]+) ms", text)
    decode = re.search(r" eval time = +([\d.]+) ms / +(\d+) runs", text.replace("prompt eval time", ""))
    if prompt is None or decode is None:
        sys.exit(f"Error: llama-completion printed no timings: {text[-400:]}")
    return {"ttft_s": float(prompt[1]) / 1e3, "s_per_token": float(decode[1]) / 1e3 / int(decode[2])}


def bench(path: Path, llama: Path, ceiling_mib: int, tokens: int) -> dict[str, Any]:
    """One run of llama-bench, file-mapped: random tokens."""
    command = [str(llama / "llama-bench"), "-m", str(path), "-t", str(len(os.sched_getaffinity(0))), "-p", "0"]
    command += ["-n", str(tokens), "-r", "1", "--no-warmup", "-lm", "mmap", "--repack", "0", "-o", "json"]
    result = run_under(ceiling_mib * MIB, command)
    if result.code:
        return {"failed": result.code}
    return {"s_per_token": 1 / json.loads(result.stdout)[0]["avg_ts"], "cgroup_peak_bytes": result.peak_bytes}


def measure(arguments: argparse.Namespace, profile: Profile) -> list[dict[str, Any]]:
    """Run all rounds; each goes to the file as it ends."""
    path, rounds = arguments.model, []
    for number in range(arguments.rounds):
        before = measure_disk(path)
        save_profile(replace(profile, disk_bytes_per_s={str(path.stat().st_dev): before}))
        ours = headrace(path, arguments.ceiling, arguments.tokens)
        disks = [before, measure_disk(path)]
        disk = statistics.mean(disks)
        one: dict[str, Any] = {
            "ours": ours,
            "disks": disks,
            "disk_bytes_per_s": disk,
            "limit_s": limit(ours, disk),
        }
        one["completion"] = completion(path, arguments.llama, arguments.ceiling, arguments.peer_tokens)
        if arguments.bench:
            one["bench"] = bench(path, arguments.llama, arguments.ceiling, arguments.peer_tokens)
        rounds.append(one)
        print(f"{number + 1}/{arguments.rounds}: {json.dumps(one)}", file=sys.stderr, flush=True)
        arguments.out.write_text(json.dumps({"ceiling_mib": arguments.ceiling, "rounds": rounds}, indent=1))
    return rounds


def limit(ours: dict[str, Any], disk_bytes_per_s: float) -> float | None:
    """Seconds per token that the disk or the cores take alone."""
    if "failed" in ours or ours["missed_bytes"] is None or ours["s_per_token"] is None:
        return None
    return float(max(ours["missed_bytes"] / disk_bytes_per_s, ours["s_per_token"] - ours["stall_s"]))


def table(rounds: list[dict[str, Any]]) -> str:
    """The medians as Markdown."""
    lines = [
        "| engine | per token | first token | limit | hit rate | missed per token | wasted | peak |",
        "|" + "---|" * 8,
    ]
    for name in ("ours", "completion", "bench"):
        good = [r for r in rounds if "failed" not in r.get(name, {"failed": 0})]

        def median(key: str, scale: float, form: str, name: str = name, good: list[dict[str, Any]] = good) -> str:
            values = [v for r in good if (v := {**r[name].get("experts", {}), **r[name]}.get(key)) is not None]
            return form.format(statistics.median(values) / scale) if values else ""

        limits = [r["limit_s"] for r in good if r["limit_s"] is not None and name == "ours"]
        cells = [
            {"ours": "headrace", "completion": "llama.cpp", "bench": "llama-bench, random tokens"}[name],
            median("s_per_token", 1, "{:.3f} s") if good else "failed or not run",
            median("ttft_s", 1, "{:.2f} s"),
            f"{statistics.median(limits):.3f} s" if limits else "",
            median("hit_rate", 0.01, "{:.1f} %"),
            median("missed_bytes", MIB, "{:.0f} MiB"),
            median("wasted_bytes", MIB, "{:.0f} MiB"),
            median("cgroup_peak_bytes", MIB, "{:.0f} MiB"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HOME / "synth-30b-a3b-q4_k_m.gguf")
    parser.add_argument("--llama", type=Path, default=Path.home() / ".cache/headrace/llama.cpp/bin")
    parser.add_argument("--ceiling", type=int, default=6000, help="MiB for the whole process")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--peer-tokens", type=int, default=6, help="it takes tens of times as long for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bench", action="store_true", help="llama-bench too")
    parser.add_argument("--out", type=Path, default=Path("moe.json"))
    arguments = parser.parse_args()
    missing = [p for p in (arguments.model, arguments.llama / "llama-completion") if not p.exists()]
    if missing:
        sys.exit(f"Error: missing: {missing[0]} (see docs/benchmarks/history.md)")
    os.environ["HEADRACE_HOME"] = str(arguments.out.resolve().parent / "benchmark-profile")
    profile = load_profile() or probe(arguments.model)
    save_profile(profile)
    rounds = measure(arguments, profile)
    print(table(rounds))


if __name__ == "__main__":
    main()
