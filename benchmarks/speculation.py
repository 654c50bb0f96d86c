"""Many tokens per pass: drafts and batches of headrace beside llama.cpp, real prompts, one ceiling for all, cold page cache.

    python benchmarks/speculation.py --target F16.gguf --draft 0.5B.gguf --copy Q3_K_M.gguf [--large 8B.gguf] [--llama DIR]
        [--rows NAME,...] [--tokens 128] [--out FILE]

Rows:
    plain-2000, plain-2500      headrace without drafts (a quarter of the tokens: its rate does not change)
    draft-2000                  the 0.5B model drafts
    copy-2500                   the self-speculation draft, a low-bit copy
    auto-2000, auto-2500        the draft that the plan chooses
    edits-plain, edits-prompt   prompt lookup on texts to be edited
    batch-1, batch-16           16 prompts at a time against one
    large-16                    the 8B shape, 16 rows in a pass, against the limit
    peer, peer-draft            llama.cpp mapped, without and with the same draft (--spec-draft-n-max 4, 8 and 16)

Every row is a separate process in a cgroup; needs root. Results are kept as JSON and printed as a table.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ceiling import run_under

MIB = 1 << 20
HERE = Path(__file__).parent
CHILD = "--child"
ROWS = "peer,plain-2000,draft-2000,copy-2500,auto-2000,edits-plain,edits-prompt,batch-1,batch-16,peer-draft"


def prompts(name: str) -> list[dict[str, str]]:
    """The prompts of a file beside this one."""
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def child(settings: dict[str, Any]) -> None:
    """Run inside the ceiling: load once, generate for every prompt, print one JSON object."""
    import headrace

    greedy = headrace.SamplingParams(temperature=0)
    requests = prompts(settings["prompts"])
    rows: list[dict[str, Any]] = []
    sequences = settings.get("sequences", 1)
    with headrace.load(
        settings["model"],
        memory=f"{settings['mib']}MiB",
        draft=settings["draft"],
        context_tokens=512,
        prompt_tokens=settings.get("prompt_tokens", 256),
        sequences=sequences,
    ) as model:
        if sequences > 1:
            texts = [requests[i % len(requests)]["prompt"] + " " * (i // len(requests)) for i in range(sequences)]
            start = time.perf_counter()
            outputs = model.generate(texts, max_tokens=settings["tokens"], sampling=greedy)
            spent = time.perf_counter() - start
            passes = [p for p in model.passes if p.rows <= sequences * 25]
            rows.append(
                {
                    "tokens": sum(a.completion_tokens for a in outputs),
                    "seconds": spent,
                    "prefill_s": model.passes[0].seconds,
                    "decode_pass_s": statistics.median(p.seconds for p in passes[2:]),
                    "decode_rows": statistics.median(p.rows for p in passes[2:]),
                    "stall_share": sum(p.stall_s for p in passes) / sum(p.seconds for p in passes),
                }
            )
        else:
            for one in requests[: settings.get("count", 99)]:
                output = model.generate(one["prompt"], max_tokens=settings["tokens"], sampling=greedy)
                t = output.timings
                rows.append(
                    {"name": one["name"], "kind": one["kind"], "text": output.text, "tok_per_s": t["decode_tok_per_s"],
                     "tokens": output.completion_tokens, "tokens_per_pass": t["tokens_per_pass"], "ttft_s": t["ttft_s"],
                     "draft_s": t["draft_s"], "stall_s": t["stall_s"], "compute_s": t["compute_s"],
                     "passes": t["passes"], "bound_by": output.speculation["passes_bound_by"]}
                )  # fmt: skip
                print(json.dumps(rows[-1] | {"text": ""}), file=sys.stderr, flush=True)
        plan = model.plan
        positions = output.speculation["accepted_by_position"] if sequences == 1 else []
        result = {
            "rows": rows,
            "load_s": model.load_s,
            "predicted_tok_per_s": 1 / plan.decode_s_per_token.expected,
            "draft": plan.drafting.name,
            "pinned_bytes": plan.pinned_bytes,
            "streamed_bytes": plan.streamed_bytes_per_pass,
            "limit_s": max(plan.streamed_bytes_per_pass / plan.disk_bytes_per_s, plan.cost(sequences).compute_s),
            "positions": positions,
            "peak_bytes": (output if sequences == 1 else outputs[0]).memory["peak_bytes"],
        }
    print(json.dumps(result))


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """One row of headrace, under its ceiling."""
    command = [sys.executable, __file__, CHILD, json.dumps(settings)]
    run = run_under(settings["mib"] * MIB, command, timeout_s=2400)
    if run.code:
        return {"failed": run.code, "stderr": run.stderr[-600:]}
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    result["cgroup_peak_bytes"] = run.peak_bytes
    return result


def peer(llama: Path, model: str, mib: int) -> dict[str, Any]:
    """llama.cpp, file-mapped, decoding alone."""
    command = [str(llama / "llama-bench"), "-m", model, "-t", str(len(os.sched_getaffinity(0))), "-p", "0", "-n", "12"]
    run = run_under(mib * MIB, [*command, "-r", "1", "--no-warmup", "-lm", "mmap", "--repack", "0", "-o", "json"])
    return {"failed": run.code} if run.code else {"tok_per_s": json.loads(run.stdout)[0]["avg_ts"]}


def peer_draft(llama: Path, target: str, draft: str, mib: int, tokens: int, count: int) -> dict[str, Any]:
    """llama.cpp with the same draft model, at several lengths of the draft."""
    rows = []
    for one in prompts("prompts.jsonl")[:: 8 // count]:
        chat = f"<|im_start|>user\n{one['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        for draft_max in (4, 8, 16):
            command = [
                str(llama / "llama-speculative-simple"),
                "-m",
                target,
                "-md",
                draft,
                "-p",
                chat,
                "-n",
                str(tokens),
            ]
            command += [
                "--spec-type",
                "draft-simple",
                "--spec-draft-n-max",
                str(draft_max),
                "--temp",
                "0",
                "-nr",
                "-c",
                "512",
            ]
            run = run_under(mib * MIB, [*command, "-t", str(len(os.sched_getaffinity(0)))], timeout_s=1200)
            text = run.stdout + run.stderr
            speed = re.search(r"decoded\s+(\d+) tokens in\s+([\d.]+) seconds, speed:\s+([\d.]+) t/s", text)
            row = {
                "name": one["name"],
                "n_max": draft_max,
                "code": run.code,
                "tok_per_s": float(speed.group(3)) if speed else None,
            }
            rows.append(row if speed else row | {"stderr": text[-400:]})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"rows": rows}


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--copy", required=True)
    parser.add_argument("--large", default="")
    parser.add_argument("--llama", type=Path, default=Path.home() / ".cache/headrace/llama.cpp/bin")
    parser.add_argument(
        "--rows", default="peer,plain-2000,draft-2000,copy-2500,auto-2000,edits-plain,edits-prompt,batch-1,batch-16"
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("speculation.json"))
    a = parser.parse_args()
    base = {"model": a.target, "prompts": "prompts.jsonl", "tokens": a.tokens, "draft": "none", "mib": 2000}
    fewer_tokens = {"tokens": a.tokens // 4}
    table = {
        "plain-2000": base | fewer_tokens,
        "plain-2500": base | fewer_tokens | {"mib": 2500},
        "draft-2000": base | {"draft": a.draft},
        "copy-2500": base | {"draft": a.copy, "mib": 2500},
        "auto-2000": base | {"draft": "auto"},
        "auto-2500": base | {"draft": "auto", "mib": 2500},
        "edits-plain": base | fewer_tokens | {"prompts": "edits.jsonl"},
        "edits-prompt": base | {"prompts": "edits.jsonl", "draft": "prompt"},
        "batch-1": base | fewer_tokens | {"count": 1},
        "batch-16": base | {"sequences": 16},
        "large-16": base | {"model": a.large, "sequences": 16, "mib": 4000, "tokens": 10, "prompt_tokens": 512},
    }
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    for name in a.rows.split(","):
        if name == "peer":
            results[name] = peer(a.llama, a.target, 2000)
        elif name == "peer-draft":
            results[name] = peer_draft(a.llama, a.target, a.draft, 2000, a.tokens // 2, 4)
        else:
            results[name] = ours(table[name])
        a.out.write_text(json.dumps(results, indent=1))
        print(name, json.dumps(_short(results[name])), flush=True)


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """A row's values for the terminal."""
    speeds = [row["tok_per_s"] for row in result.get("rows", []) if row.get("tok_per_s")]
    kept = {k: v for k, v in result.items() if k not in ("rows", "positions")}
    if speeds:
        kept |= {"mean": statistics.mean(speeds), "worst": min(speeds), "best": max(speeds)}
    elif result.get("rows"):
        kept |= {"row": result["rows"][0]}
    return kept


if __name__ == "__main__":
    main()
