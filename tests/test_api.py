"""The library: `headrace.load` and its model; a conversation is not computed twice."""

import gc
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import headrace
import headrace.api
from headrace.cli import main
from headrace.engine.timeline import PassLog, PassStats
from headrace.errors import BudgetError, ContextError, UsageError
from headrace.plan import Profile
from headrace.sampling_params import recommended
from headrace.stream import Arena
from headrace.units import MIB
from support.zoo.gguf_files import random_model, write_gguf

GREEDY = headrace.SamplingParams(temperature=0)


@pytest.fixture
def measured(profile: Profile) -> Profile:
    return replace(profile, runtime_bytes=100 * MIB)


@pytest.fixture
def model(tiny_llama: Path, measured: Profile):  # type: ignore[no-untyped-def]
    with headrace.load(str(tiny_llama), memory="4GiB", context_tokens=256, profile=measured) as loaded:
        yield loaded


def test_stream_yields_a_piece_per_token_and_then_the_finish_reason(model: headrace.Model) -> None:
    pieces = list(model.stream("hello", max_tokens=5, sampling=GREEDY))
    assert [piece.completion_tokens for piece in pieces[:5]] == [1, 2, 3, 4, 5][: len(pieces[:5])]
    assert pieces[-1].finish_reason in ("stop", "length")
    assert pieces[-1].token is None
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_generate_is_the_text_of_the_stream(model: headrace.Model) -> None:
    # The prompt is so short that both times use the decode path; the second time most of it is cached.
    streamed = "".join(piece.text for piece in model.stream("hello", raw=True, max_tokens=8, sampling=GREEDY))
    assert model.generate("hello", raw=True, max_tokens=8, sampling=GREEDY).text == streamed


def test_a_continued_conversation_computes_only_its_new_tokens(tiny_llama: Path, profile: Profile) -> None:
    with headrace.load(tiny_llama, memory="2GiB", profile=profile, deterministic=False) as model:
        continue_a_conversation(model)


def continue_a_conversation(model: headrace.Model) -> None:
    messages = [{"role": "user", "content": "hello"}]
    first = model.generate(messages, max_tokens=4, sampling=GREEDY)
    before = len(model.passes)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "more"}]
    second = model.generate(messages, max_tokens=4, sampling=GREEDY)
    rows = sum(p.rows for p in model.passes[before:])
    assert rows < second.prompt_tokens  # the common prefix was in the cache
    model.generate([{"role": "user", "content": "something else"}], max_tokens=2, sampling=GREEDY)
    assert model.generate(messages, max_tokens=4, sampling=GREEDY).text == second.text


def test_a_stop_string_ends_the_answer(model: headrace.Model) -> None:
    text = model.generate("hello", max_tokens=30, sampling=GREEDY, raw=True).text
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    stopped = model.generate("hello", max_tokens=30, sampling=GREEDY, raw=True, stop=[middle])
    assert stopped.text == text[: text.index(middle)]
    assert stopped.finish_reason == "stop"


def test_sampling_with_a_seed_repeats(model: headrace.Model) -> None:
    sampling = headrace.SamplingParams(temperature=1.5, top_k=50, seed=3)
    # A short prompt: a longer one is prefilled first, and computed by the decode path after a cached prefix.
    texts = [model.generate("hello", max_tokens=12, sampling=sampling, raw=True).text for _ in range(2)]
    assert texts[0] == texts[1]
    other = headrace.SamplingParams(temperature=1.5, top_k=50, seed=4)
    assert model.generate("hello", max_tokens=12, sampling=other, raw=True).text != texts[0]


def test_long_prompts_are_prefilled_in_several_passes(tiny_llama: Path, measured: Profile) -> None:
    prompt = "word " * 40
    with headrace.load(str(tiny_llama), memory="4GiB", context_tokens=400, prompt_tokens=16, profile=measured) as small:
        chunked = small.generate(prompt, max_tokens=3, sampling=GREEDY, raw=True)
        assert max(p.rows for p in small.passes) == 16
        assert chunked.timings["passes"] > 3
    with headrace.load(
        str(tiny_llama), memory="4GiB", context_tokens=400, prompt_tokens=400, profile=measured
    ) as large:
        whole = large.generate(prompt, max_tokens=3, sampling=GREEDY, raw=True)
        assert large.passes[0].rows == whole.prompt_tokens
    assert chunked.prompt_tokens == whole.prompt_tokens


@pytest.mark.parametrize("maps", [True, False])
def test_pinned_rows_are_mapped_if_the_plan_says_so(
    tiny_llama: Path, profile: Profile, maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = headrace.api.make_plan
    monkeypatch.setattr(headrace.api, "make_plan", lambda *a, **more: replace(plan(*a, **more), map_pinned=maps))
    with headrace.load(tiny_llama, memory="4GiB", context_tokens=64, draft=None, profile=profile) as model:
        model.generate("hello", max_tokens=2, sampling=GREEDY, raw=True)
        assert (str(tiny_llama) in Path("/proc/self/maps").read_text()) == maps


def test_progress_is_reported_during_prefill(model: headrace.Model) -> None:
    seen = []
    model.generate("something new", max_tokens=1, on_progress=seen.append)
    assert seen[-1].done == seen[-1].steps
    assert [p.done for p in seen] == list(range(1, seen[-1].steps + 1))


def test_a_prompt_or_budget_that_does_not_fit_is_refused(tiny_llama: Path, model: headrace.Model) -> None:
    with pytest.raises(ContextError, match="the context holds 256"):
        model.generate("x" * 1000)
    with pytest.raises(UsageError, match="empty"):
        model.generate("", raw=True)
    with pytest.raises(BudgetError, match="at least"):
        headrace.load(str(tiny_llama), memory="1MiB")


def test_streams_may_be_open_together_and_none_after_closing(tiny_llama: Path, measured: Profile) -> None:
    with headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, profile=measured) as loaded:
        alone = loaded.generate("hello", max_tokens=3, sampling=GREEDY).text
        first = loaded.stream("hello", max_tokens=3, sampling=GREEDY)
        text = next(first).text
        assert loaded.generate("hello", max_tokens=3, sampling=GREEDY).text == alone
        assert text + "".join(output.text for output in first) == alone
    with pytest.raises(UsageError, match="closed"):
        loaded.generate("hello", max_tokens=2)


@pytest.mark.parametrize("count", [0, -1])
def test_an_answer_has_at_least_one_token(model: headrace.Model, count: int) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        model.generate("hello", max_tokens=count)


def test_a_load_that_fails_leaves_nothing_behind(
    tiny_llama: Path, measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AttentionInterface

    def refuse(*_: object, **__: object) -> None:
        raise BudgetError("too little", hint="more")

    with headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, profile=measured):
        pass
    before = len(os.listdir("/proc/self/fd")), len(AttentionInterface._global_mapping), threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(
            "headrace.api.make_plan", refuse
        )  # as when the built model needs more memory than its header implies
        with pytest.raises(BudgetError):
            headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, profile=measured)
    with monkeypatch.context() as patch:
        patch.setattr("headrace.engine.model_weights.ModelWeights._make_experts", refuse)
        with pytest.raises(BudgetError):
            headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, draft=str(tiny_llama), profile=measured)
    gc.collect()
    assert before == (
        len(os.listdir("/proc/self/fd")),
        len(AttentionInterface._global_mapping),
        threading.active_count(),
    )


def test_reads_through_the_page_cache_are_reported(
    tiny_llama: Path, measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        loaded = headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, profile=measured)
    with loaded:
        assert any("page cache" in reason for reason in loaded.plan.reasons)


def test_passes_leave_the_threads_of_torch_as_they_were(tiny_llama: Path, measured: Profile) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, profile=measured) as loaded:
            loaded.generate("hello", max_tokens=3, sampling=GREEDY, raw=True)
            assert torch.get_num_threads() == 2  # passes run in a thread of their own
            other = headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, profile=measured)
            other.generate("hello", max_tokens=3, sampling=GREEDY, raw=True)
        other.close()
        other.close()
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert (torch.get_num_threads(), seen) == (2, [2])
    finally:
        torch.set_num_threads(before)


def test_the_plan_uses_the_requested_context_and_kv_bits(
    tiny_llama: Path, measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No refusal because of a larger default context, and a KV cache of 8 bits where 8 are requested."""
    from headrace.plan import choose_drafting

    requested = []

    def noted(checkpoint: Any, profile: Any, budget: Any, request: Any, options: Any) -> Any:
        requested.append((request.context_tokens, request.kv_bits))
        return choose_drafting(checkpoint, profile, budget, request, options)

    monkeypatch.setattr("headrace.api.choose_drafting", noted)
    monkeypatch.setattr("headrace.cli.plan.load_profile", lambda: measured)
    arguments = [
        "run",
        str(tiny_llama),
        "hello",
        "--memory",
        "4GiB",
        "-n",
        "3",
        "-c",
        "48",
        "--kv-bits",
        "8",
        "--json",
        "-q",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert set(requested) == {(48, 8)}
    plan = json.loads(result.stdout)["plan"]
    assert (plan["context_tokens"], plan["kv_bits"]) == (48, 8)


def test_a_draft_for_a_model_whose_cache_cannot_be_rolled_back_is_refused(tmp_path: Path, measured: Profile) -> None:
    path = write_gguf(random_model("bloom"), "bloom", tmp_path / "bloom.gguf", "Q8_0")
    with pytest.raises(UsageError, match="native cache"):
        headrace.load(str(path), memory="4GiB", context_tokens=64, draft="prompt", profile=measured)
    with headrace.load(str(path), memory="4GiB", context_tokens=64, profile=measured) as loaded:
        assert "native cache" in " ".join(loaded.plan.reasons)


def test_closing_twice_is_fine_and_leaves_no_reader(tiny_llama: Path, measured: Profile) -> None:
    before = threading.active_count()
    loaded = headrace.load(str(tiny_llama), memory="4GiB", context_tokens=64, profile=measured)
    loaded.generate("hello", max_tokens=2)
    loaded.close()
    loaded.close()
    assert threading.active_count() == before


def test_the_public_names_are_these() -> None:
    assert headrace.__all__ == [
        "AsyncLLM",
        "Completion",
        "HeadraceError",
        "Model",
        "Plan",
        "Request",
        "RequestOutput",
        "SamplingParams",
        "__version__",
        "load",
    ]
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None


def test_a_stop_string_may_be_given_alone(model: headrace.Model) -> None:
    text = model.generate("hello", max_tokens=30, sampling=GREEDY, raw=True).text
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    assert (
        model.generate("hello", max_tokens=30, sampling=GREEDY, raw=True, stop=middle).text
        == text[: text.index(middle)]
    )


def test_a_model_that_is_closed_while_it_answers_says_so(tiny_llama: Path, measured: Profile) -> None:
    model = headrace.load(tiny_llama, memory="4GiB", context_tokens=64, profile=measured, draft=None)
    pieces = model.stream("hello", max_tokens=9, sampling=GREEDY)
    next(pieces)
    model.close()
    with pytest.raises(UsageError, match="closed while it answered"):
        list(pieces)


def test_closing_gives_the_memory_back(tiny_llama: Path, measured: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    monkeypatch.setattr(Arena, "give_back", lambda arena: given_back.append(arena.nbytes))
    with headrace.load(tiny_llama, memory="4GiB", context_tokens=64, profile=measured, draft=None) as model:
        model.generate("hello", max_tokens=2, sampling=GREEDY)
    assert sum(given_back) > model.plan.pinned_bytes


def test_sampling_recommended_by_a_file_is_used_where_it_is_valid() -> None:
    found = {"temperature": 0.5, "top_k": -1, "top_p": 0, "min_p": "a little"}
    assert recommended(found) == headrace.SamplingParams(temperature=0.5)
    assert recommended({"temperature": None}) == headrace.SamplingParams()


def test_only_the_latest_passes_are_kept_but_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PassLog, "MOST", 3)
    log = PassLog()
    for number in range(10):
        log.append(PassStats(rows=number, start_s=0, seconds=1, read_bytes=0, stall_s=0, kernel_s=0))
    assert len(log) == 10
    assert [one.rows for one in log] == [one.rows for one in log[0:]] == [6, 7, 8, 9]
    assert [one.rows for one in log[8:]] == [8, 9]
    assert [one.rows for one in log[5:9]] == [6, 7, 8]
    assert log[-1].rows == log[9].rows == 9
    with pytest.raises(IndexError):
        log[0]
