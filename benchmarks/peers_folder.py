"""A Hugging Face folder in bf16 that does not fit, under one ceiling: accelerate's disk offload, AirLLM and headrace in turn.

    python benchmarks/peers_folder.py FOLDER [--ceiling 2000] [--tokens 6] [--rounds 3] [--engines accelerate,airllm,...]

Every run is a process in a separate cgroup with a cold page cache and the same greedy prompt. Seconds per token are those
between the first token and the last, by their times of arrival: loading and prefill are left out. AirLLM
has its own virtual environment (--airllm; `pip install torch==2.13.0`, then `pip install airllm==4.0.0`) and splits the
folder into a file per layer once, before the first round and without a ceiling; that needs the folder's size on disk again.
Needs root.

accelerate keeps in memory what `max_memory` allows (--max-memory) and maps the rest from the folder. More is not always faster,
for the mapped rest needs page cache under the same ceiling: try several and give it its best.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ceiling import run_under

MIB = 1 << 20
PROMPT = "Write a Python function that reverses a string."
HOME = Path.home() / ".cache" / "headrace"
# headrace drafts by default, so its tokens come in groups: it writes more of them.
OURS = {"headrace-plain": "none", "headrace": "auto"}
ENGINES = ("accelerate", "airllm", *OURS)
DRAFTED_TOKENS = 48


def accelerate(folder: Path, offload: Path, memory_mib: int, tokens: int) -> dict[str, Any]:
    """Disk offload of transformers, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": memory_mib * MIB},
        offload_folder=str(offload),
    )
    places = list(model.hf_device_map.values())
    return {**generated(model, folder, tokens), "modules_on_disk": places.count("disk"), "modules": len(places)}


def airllm(folder: Path, shards: Path, tokens: int) -> dict[str, Any]:
    """AirLLM on the CPU, in this process. `tokens` of 0 only splits."""
    import torch
    from airllm import AutoModel  # type: ignore[import-not-found]

    model = AutoModel.from_pretrained(
        str(folder), device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=str(shards)
    )
    return generated(model, folder, tokens) if tokens else {}


def generated(model: Any, folder: Path, tokens: int) -> dict[str, Any]:
    """Greedy output, TTFT and seconds per token."""
    import torch
    from transformers import AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())  # first the prompt, then every token

        def end(self) -> None:
            pass

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer, clock = AutoTokenizer.from_pretrained(folder), Clock()
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, use_cache=True, streamer=clock)
    prompt, first, *_, last = clock.times
    new = ids[0, inputs["input_ids"].shape[1] :]
    return {
        "ttft_s": first - prompt,
        "s_per_token": (last - first) / (len(new) - 1),
        "tokens": len(new),
        "text": tokenizer.decode(new, skip_special_tokens=True),
    }


def run_engine(name: str, arguments: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """One run in a separate process, under the ceiling (splitting has none)."""
    limit = arguments.ceiling * MIB if tokens else None
    python = str(arguments.airllm) if name == "airllm" else sys.executable
    if name in OURS:
        tokens = tokens if OURS[name] == "none" else max(tokens, DRAFTED_TOKENS)
        command = [python, "-c", "from headrace.cli import main; main()", "run", str(arguments.folder), PROMPT]
        command += [
            "--memory",
            f"{arguments.ceiling}MiB",
            "--json",
            "-q",
            "-t",
            "0",
            "-n",
            str(tokens),
            "--draft",
            OURS[name],
        ]
    else:
        command = [python, __file__, str(arguments.folder), "--only", name, "--tokens", str(tokens)]
        command += ["--max-memory", str(arguments.max_memory), "--scratch", str(arguments.scratch)]
    result = run_under(limit, command)
    if result.code:
        return {"failed": result.code, "stderr": result.stderr[-600:]}
    answer = json.loads(result.stdout.splitlines()[-1])  # AirLLM prints before it
    return {**(decoded(answer) if name in OURS else answer), "cgroup_peak_bytes": result.peak_bytes}


def decoded(answer: dict[str, Any]) -> dict[str, Any]:
    """Values of headrace's `--json` that the others have too."""
    timings = answer["timings"]
    return {
        "ttft_s": timings["ttft_s"],
        "s_per_token": 1 / timings["decode_tok_per_s"],
        "tokens": answer["usage"]["completion_tokens"],
        "text": answer["text"],
        "own_peak_bytes": answer["memory"]["peak_bytes"],
    }


def only(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine's run, in a child process."""
    scratch = arguments.scratch / arguments.folder.name
    if name == "airllm":
        return airllm(arguments.folder, scratch / "airllm", arguments.tokens)
    offload = scratch / "accelerate"
    offload.mkdir(parents=True, exist_ok=True)
    return accelerate(arguments.folder, offload, arguments.max_memory, arguments.tokens)


def table(name: str, rounds: list[dict[str, Any]]) -> str:
    """A line of Markdown, and the text below it."""
    good = [r for r in rounds if "failed" not in r]
    if not good:
        return f"| {name} | failed: {rounds[0]['failed'] if rounds else 'no round'} | | | |"
    seconds = statistics.median(r["s_per_token"] for r in good)
    ttft = statistics.median(r["ttft_s"] for r in good)
    peak = max(r["cgroup_peak_bytes"] for r in good) / MIB
    return f"| {name} | {1 / seconds:.3f} tok/s | {seconds:.3f} s | {ttft:.2f} s | {peak:.0f} MiB | {good[0]['text']!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ceiling", type=int, default=2000, help="MiB for the whole process")
    parser.add_argument("--tokens", type=int, default=6, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--max-memory", type=int, default=900, help="MiB that accelerate may keep in memory")
    parser.add_argument("--airllm", type=Path, default=HOME / "airllm-venv/bin/python", help="its Python")
    parser.add_argument("--scratch", type=Path, default=HOME / "peers", help="for split and offloaded weights")
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    parser.add_argument("--only", choices=ENGINES[:2], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    if arguments.only:
        print(json.dumps(only(arguments.only, arguments)))
        return
    engines = arguments.engines.split(",")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    if "airllm" in engines and "failed" in (split := run_engine("airllm", arguments, 0)):
        sys.exit(f"Error: AirLLM does not split the folder: {split['stderr']}")
    for number in range(arguments.rounds):
        for name in engines:
            rounds[name].append(run_engine(name, arguments, arguments.tokens))
            print(
                f"{name} {number + 1}/{arguments.rounds}: {json.dumps(rounds[name][-1])}", file=sys.stderr, flush=True
            )
            arguments.out.write_text(json.dumps({"ceiling_mib": arguments.ceiling, "rounds": rounds}, indent=1))
    print("| engine | speed | per token | first token | peak | text |\n" + "|---" * 6 + "|")
    for name in engines:
        print(table(name, rounds[name]))


if __name__ == "__main__":
    main()
