"""Requests that join, leave and fail between passes; memory as one pool of tokens; prompts that share a pass."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from headrace.engine import Engine
from headrace.engine.attention import KVCache
from headrace.engine.runner import ModelRunner
from headrace.engine.sampler import Sampler
from headrace.engine.speculation import Speculation, StepTimeModel
from headrace.engine.step import PrefixCopy, RowsInput, StepInput
from headrace.kernels.thresholds import GEMM_CHUNK_ROWS, KV_BLOCK_TOKENS
from headrace.plan import Profile
from headrace.process import resident_bytes
from headrace.sampling_params import SamplingParams
from support.drafting import Oracle, free_rows
from support.engines import build_engine
from support.stepping import Stepper
from support.zoo.by_position import NUMBER, SAID, write_alphabet

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.1, seed=4)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[Engine]:
    with build_engine(tiny_llama) as found:
        yield found


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ALONE: dict[str, list[int]] = {}  # outputs by the arguments of `alone`


def alone(engine: Engine, tokens: list[int], count: int, sampling: SamplingParams, capacity: int = 256) -> list[int]:
    key = repr((tokens, count, sampling, capacity))
    if key not in ALONE:
        stepper = Stepper(engine, 1, capacity, 64)
        sequence = stepper.add(tokens, count, Sampler(sampling))
        stepper.finish([sequence])
        ALONE[key] = sequence.tokens
    return ALONE[key]


# -- steps are data -----------------------------------------------------------------------------------------------------


def test_a_step_from_another_process_gives_the_same_bits(engine: Engine) -> None:
    steps = [
        StepInput(rows=(RowsInput(slot=0, start=0, token_ids=(5, 6, 7), row_invariant=True),)),
        StepInput(
            rows=(
                RowsInput(slot=0, start=2, token_ids=(9, 9), num_logits=2, row_invariant=True),
                RowsInput(slot=1, start=2, token_ids=(8,), row_invariant=True),
            ),
            copies=(PrefixCopy(source=0, target=1, length=2),),
        ),
        StepInput(rows=(RowsInput(slot=1, start=3, token_ids=(4,), row_invariant=True),), truncated=((0, 0),)),
    ]
    first, second = ModelRunner(engine, 2, 64), ModelRunner(engine, 2, 64)
    for step in steps:
        sent = pickle.loads(pickle.dumps(step))
        assert sent == step
        one, other = first.execute(step).logits, second.execute(sent).logits
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_cache_forgets_what_lies_behind_the_start_of_new_rows(engine: Engine) -> None:
    def run(*steps: tuple[int, tuple[int, ...]]) -> torch.Tensor:
        runner = ModelRunner(engine, 1, 64)
        for start, token_ids in steps:
            row = RowsInput(slot=0, start=start, token_ids=token_ids, row_invariant=True)
            logits = runner.execute(StepInput(rows=(row,))).logits
        assert logits is not None
        return logits

    assert torch.equal(run((0, (5, 6, 7, 8)), (2, (9,))), run((0, (5, 6)), (2, (9,))))


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lookup", [False, True], ids=["plain", "draft"])
def test_sequences_that_outgrow_the_pool_are_preempted_and_lose_no_token(
    engine: Engine, sampling: SamplingParams, lookup: bool
) -> None:
    prompts = [prompt(length, length) for length in (20, 50, 61, 30, 45)]
    expected = [alone(engine, one, 60, sampling, 128) for one in prompts]
    speculation = Speculation(StepTimeModel(free_rows), None, Oracle(expected[1], 3)) if lookup else None
    pool = 3 * KV_BLOCK_TOKENS
    options = {"max_draft_tokens": 4 if lookup else 0, "kv_tokens": pool}
    stepper = Stepper(engine, 4, 128, 64, speculation, **options)
    sequences = [stepper.add(one, 60, Sampler(sampling)) for one in prompts]
    most, preempted = 0, 0
    left = list(sequences)
    while left:
        running = set(stepper.scheduler.running)
        stepper.step()
        slots = stepper.scheduler.pool.slots
        held = sum(-(-len(slot.tokens) // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS for slot in slots)
        most = max(most, held)
        preempted += len([one for one in running if one in stepper.scheduler.waiting])
        for one in [one for one in left if one.generated == 60]:
            stepper.remove(one)
            left.remove(one)
    assert [one.tokens for one in sequences] == expected
    assert most <= pool
    assert preempted > 0


def test_idle_caches_are_dropped_for_new_sequences(engine: Engine) -> None:
    stepper = Stepper(engine, 3, 128, 64, kv_tokens=2 * KV_BLOCK_TOKENS)
    for seed in range(4):
        tokens = prompt(90, seed)
        sequence = stepper.add(tokens, 5, Sampler(GREEDY))
        stepper.finish([sequence])
        assert sequence.tokens == alone(engine, tokens, 5, GREEDY, 128)


def test_a_waiting_request_starts_when_memory_is_free(engine: Engine) -> None:
    stepper = Stepper(engine, 2, 128, 64, kv_tokens=128)
    first, second = (stepper.add(prompt(70, seed), 4, Sampler(GREEDY)) for seed in (1, 2))
    while first.generated < 4:
        stepper.step()
        assert second.running_slot is None, "128 tokens hold one of them"
    stepper.remove(first)
    stepper.finish([second])
    assert second.tokens == alone(engine, prompt(70, 2), 4, GREEDY, 128)


@pytest.mark.parametrize("bits", [16, 8])
def test_memory_of_forgotten_positions_goes_back_to_the_system(bits: int) -> None:
    layers, heads, capacity, width = 4, 4, 8192, 128
    cache = KVCache(layers, capacity, bits)
    rows = torch.randn(heads, capacity, width)
    for layer in range(layers):
        cache.put(layer, 0, rows, rows)
    cache.length = capacity
    kept = [cache.get(layer, 100)[0].clone() for layer in range(layers)]
    before = resident_bytes()
    cache.truncate(100)
    cache.return_memory()
    nbytes = 2 * layers * heads * capacity * width * bits // 8
    assert before - resident_bytes() > 0.9 * nbytes
    assert all(torch.equal(cache.get(layer, 100)[0], one) for layer, one in enumerate(kept))


# -- sharing a pass -------------------------------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one(engine: Engine) -> None:
    stepper = Stepper(engine, 3, 1024, 128)
    long, other = (stepper.add(prompt(600, seed), 4, Sampler(GREEDY)) for seed in (1, 2))
    stepper.step()
    short = stepper.add(prompt(60, 3), 4, Sampler(GREEDY))
    for _ in range(3):
        stepper.step()
    assert short.generated
    assert not long.generated
    done = [len(one.slot.tokens) for one in (long, other)]
    assert abs(done[0] - done[1]) <= GEMM_CHUNK_ROWS, "both prompts get the same share"
    stepper.finish([long, other, short])
    assert short.tokens == alone(engine, prompt(60, 3), 4, GREEDY)


def test_draft_tokens_are_verified_while_a_prompt_is_computed(engine: Engine) -> None:
    expected = alone(engine, prompt(10, 1), 60, GREEDY)
    speculation = Speculation(StepTimeModel(free_rows), None, Oracle(expected, 1000))
    stepper = Stepper(engine, 2, 1024, 128, speculation, max_draft_tokens=4)
    first = stepper.add(prompt(10, 1), 60, Sampler(GREEDY))
    stepper.step()
    second = stepper.add(prompt(900, 2), 4, Sampler(GREEDY))
    before, drafted = first.generated, stepper.drafted
    stepper.step()
    assert not second.generated, "the prompt is computed in the same pass"
    assert stepper.drafted > drafted
    assert first.generated > before + 1
    stepper.finish([first, second])
    assert first.tokens == expected
    assert second.tokens == alone(engine, prompt(900, 2), 4, GREEDY, 1024)


def test_draft_tokens_that_cost_more_than_they_give_stay_out_of_a_prompts_pass(engine: Engine) -> None:
    def costly(rows: int) -> Any:
        return replace(free_rows(rows), disk_s=1e-6, compute_s=1.0 * rows)

    expected = alone(engine, prompt(10, 1), 30, GREEDY)
    speculation = Speculation(StepTimeModel(costly), None, Oracle(expected, 1000))
    stepper = Stepper(engine, 2, 1024, 128, speculation, max_draft_tokens=4)
    first = stepper.add(prompt(10, 1), 30, Sampler(GREEDY))
    stepper.step()
    stepper.add(prompt(900, 2), 4, Sampler(GREEDY))
    drafted = stepper.drafted
    stepper.step()
    assert stepper.drafted == drafted
    assert first.generated


def test_a_sequence_that_cannot_start_leaves_idle_caches_alone(engine: Engine) -> None:
    stepper = Stepper(engine, 3, 256, 64, kv_tokens=256)
    idle = stepper.add(prompt(50, 1), 2, Sampler(GREEDY))
    stepper.finish([idle])
    long = stepper.add(prompt(120, 2), 60, Sampler(GREEDY))
    stepper.step()
    waiting = stepper.add(prompt(190, 3), 4, Sampler(GREEDY))
    stepper.step()
    assert waiting.running_slot is None
    assert any(slot.tokens == idle.tokens[:-1] for slot in stepper.scheduler.pool.slots)
    stepper.finish([long, waiting])
    assert waiting.tokens == alone(engine, prompt(190, 3), 4, GREEDY)


def test_accepted_draft_tokens_behind_the_end_do_not_count(tmp_path: Path, profile: Profile) -> None:
    path = write_alphabet(tmp_path / "m.gguf")
    with headrace.load(path, memory="4GiB", context_tokens=64, draft="prompt", profile=profile) as model:
        request = model.request("hi", sampling=GREEDY, stop="c")
        said = [*request.token_ids, *map(NUMBER, SAID)]
        model._llm_engine.scheduler.speculation = Speculation(StepTimeModel(free_rows), None, Oracle(said, 1000))
        last = list(model.stream_requests([request]))[-1]
    assert last.stats.decode.drafted > 2, "the draft went on behind the stop string"
    assert last.completion_tokens == last.stats.prefill.tokens + last.stats.decode.tokens == 3
