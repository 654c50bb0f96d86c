"""Speculative decoding must change nothing but the time: the same tokens greedily, the same distribution when sampling."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace.engine import Engine
from headrace.engine.drafters import ConfidenceBucket, Draft, ModelDrafter, PromptLookup
from headrace.engine.runner import ModelRunner
from headrace.engine.sampler import Sampler, distribution, uniform
from headrace.engine.speculation import Acceptance, Speculation, StepTimeModel
from headrace.engine.timeline import PassStats
from headrace.plan.cost import PassCost
from headrace.sampling_params import SamplingParams
from support.drafting import Oracle, free_rows
from support.engines import build_engine
from support.stepping import Stepper
from support.zoo.gguf_files import random_model, write_gguf

PROMPT = [5, 17, 99, 3, 250, 41, 7, 5, 17, 99]
CONTEXT = 96


def decode(
    engine: Engine, sampling: SamplingParams, count: int, speculation: Speculation | None, prompt: list[int] = PROMPT
) -> list[int]:
    return stepped(engine, sampling, count, speculation, prompt)[0]


def stepped(
    engine: Engine, sampling: SamplingParams, count: int, speculation: Speculation | None, prompt: list[int] = PROMPT
) -> tuple[list[int], Stepper]:
    stepper = Stepper(engine, 1, CONTEXT, 16, speculation, max_draft_tokens=12)
    sequence = stepper.add(prompt, count, Sampler(sampling))
    while sequence.generated < count:
        stepper.step()
    assert sequence.generated == count, "draft tokens never run over the limit"
    assert sequence.slot.tokens == sequence.tokens[:-1]
    return sequence.tokens, stepper


@pytest.fixture(scope="module")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(99)  # other weights than the model that verifies
    return write_gguf(random_model("llama"), "llama", tmp_path_factory.mktemp("draft") / "draft.gguf", "Q8_0")


@pytest.fixture(scope="module")
def target(tiny_llama: Path) -> Iterator[Engine]:
    with build_engine(tiny_llama) as engine:
        yield engine


SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, seed=11),
    SamplingParams(temperature=0.5, repetition_penalty=1.5, frequency_penalty=1.0, logit_bias={3: 2.0}, seed=5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("wrong_every", [2, 3, 7, 1000])
def test_with_any_draft_the_tokens_are_those_of_plain_decoding(
    target: Engine, sampling: SamplingParams, wrong_every: int
) -> None:
    plain = decode(target, sampling, 40, None)
    before = len(target.passes)
    drafted_tokens = decode(
        target, sampling, 40, Speculation(StepTimeModel(free_rows), None, Oracle(plain, wrong_every))
    )
    assert drafted_tokens == plain
    assert len(target.passes) - before < 40  # and it was worth it


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalised"])
def test_a_draft_model_and_prompt_lookup_change_no_token(
    target: Engine, tiny_draft: Path, tiny_llama: Path, sampling: SamplingParams
) -> None:
    plain = decode(target, sampling, 40, None)
    for path in (tiny_draft, tiny_llama):  # one that is always rejected, one that is always accepted
        with build_engine(path, share=1.0) as draft:
            model = ModelDrafter(ModelRunner(draft, 1, CONTEXT))
            assert decode(target, sampling, 40, Speculation(StepTimeModel(free_rows), PromptLookup(), model)) == plain


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3", "phi3"])
def test_caches_roll_back_exactly_with_sliding_windows_too(family: str, tmp_path: Path) -> None:
    with build_engine(write_gguf(random_model(family), family, tmp_path / "tiny.gguf", "Q8_0")) as engine:
        plain = decode(engine, SAMPLINGS[0], 30, None)  # longer than the windows of 8
        assert decode(engine, SAMPLINGS[0], 30, Speculation(StepTimeModel(free_rows), None, Oracle(plain, 3))) == plain


def test_draft_tokens_of_the_model_itself_are_always_accepted(target: Engine, tiny_llama: Path) -> None:
    sampling = SAMPLINGS[1]
    with build_engine(tiny_llama, share=1.0) as draft:
        speculation = Speculation(StepTimeModel(free_rows), None, ModelDrafter(ModelRunner(draft, 1, CONTEXT)))
        before = len(target.passes)
        _, stepper = stepped(target, sampling, 40, speculation)
    assert stepper.drafted == stepper.accepted > 0
    assert len(target.passes) - before <= 10  # of 40 tokens: the draft length depends on measured times


def test_sequences_together_equal_sequences_alone_with_draft_tokens_for_all(target: Engine) -> None:
    prompts = [PROMPT, [*PROMPT[:5], 8, 8, 9], [200, 3, 3, 200, 3, 3, 200], list(range(40))]
    alone = [decode(target, SAMPLINGS[1], 20, None, prompt) for prompt in prompts]
    speculation = Speculation(StepTimeModel(free_rows), PromptLookup())
    stepper = Stepper(target, 3, CONTEXT, 16, speculation, max_draft_tokens=4)
    sequences = [stepper.add(prompt, 20, Sampler(SAMPLINGS[1])) for prompt in prompts]
    stepper.finish(sequences)
    assert [sequence.tokens for sequence in sequences] == alone


def test_a_common_prefix_is_computed_once(target: Engine) -> None:
    prefix = [(7 * i) % 300 for i in range(48)]
    prompts = [[*prefix, 1, 2], [*prefix, 3], [*prefix, 4, 5, 6]]
    alone = [decode(target, SAMPLINGS[0], 6, None, prompt) for prompt in prompts]
    stepper = Stepper(target, len(prompts), CONTEXT, 16)
    before = len(target.passes)
    sequences = [stepper.add(prompt, 6, Sampler(SAMPLINGS[0])) for prompt in prompts]
    stepper.finish(sequences)
    assert [sequence.tokens for sequence in sequences] == alone
    assert sum(p.rows for p in target.passes[before:]) < 2 * len(prefix) + 3 * 6


def test_a_sequence_does_not_wait_for_a_prefix_source_that_was_removed(target: Engine) -> None:
    prefix = [(5 * i) % 300 for i in range(40)]
    stepper = Stepper(target, 2, CONTEXT, 16)
    first = stepper.add([*prefix, 1], 4, Sampler(SAMPLINGS[0]))
    second = stepper.add([*prefix, 2], 4, Sampler(SAMPLINGS[0]))
    stepper.step()
    stepper.remove(first)
    stepper.finish([second])
    assert second.tokens == decode(target, SAMPLINGS[0], 4, None, [*prefix, 2])


# -- the distribution ---------------------------------------------------------------------------------------------

TARGET = torch.tensor([1.2, 0.3, -0.5, 0.9, -1.0, 0.1])
DRAFT = torch.tensor([0.2, 1.3, -0.5, -0.9, 1.0, 0.4])
FILTERS = SamplingParams(temperature=0.8, top_k=5, top_p=0.95, min_p=0.02)
DRAWS = 4000


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic over the tokens that can occur; infinite if another one did."""
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return float("inf")
    difference = counts[possible] - DRAWS * expected[possible]
    return float((difference**2 / (DRAWS * expected[possible])).sum())


def exact() -> torch.Tensor:
    expected = torch.zeros(6)
    probabilities, tokens = distribution(TARGET, FILTERS)
    expected[tokens] = probabilities
    return expected


# 99.9 % of samples of the right distribution with up to five tokens (four degrees of freedom) are below this.
LIMIT = 18.5


def second_tokens(verify: str) -> torch.Tensor:
    """Counts of the token after verification of a draft token, by a right rule or a known wrong one."""
    counts = torch.zeros(6)
    for seed in range(DRAWS):
        sampler = Sampler(SamplingParams(**{**FILTERS.__dict__, "seed": seed}))
        draft_token = sampler.draw(DRAFT, range(10))
        if verify == "ours":
            token = sampler.draw(TARGET, range(10))
        elif verify == "accepts every draft token":
            token = draft_token
        elif verify == "accepts likely draft tokens, else draws again":
            token = draft_token if TARGET.softmax(0)[draft_token] > 0.1 else sampler.draw(TARGET, range(11))
        else:  # the filters are forgotten when verifying
            token = Sampler(SamplingParams(temperature=0.8, seed=seed)).draw(TARGET, range(10))
        counts[token] += 1
    return counts


def test_verified_tokens_have_the_distribution_of_plain_sampling() -> None:
    assert chi_square(second_tokens("ours"), exact()) < LIMIT


@pytest.mark.parametrize(
    "wrong", ["accepts every draft token", "accepts likely draft tokens, else draws again", "forgets the filters"]
)
def test_the_statistic_finds_wrong_acceptance(wrong: str) -> None:
    assert chi_square(second_tokens(wrong), exact()) > 2 * LIMIT


def test_draws_of_neighbouring_positions_are_independent() -> None:
    pairs = torch.zeros(6, 6)
    for seed in range(DRAWS):
        sampler = Sampler(SamplingParams(**{**FILTERS.__dict__, "seed": seed}))
        pairs[sampler.draw(TARGET, range(4)), sampler.draw(TARGET, range(5))] += 1
    expected = torch.outer(exact(), exact()).flatten()
    # 24 degrees of freedom: 99.9 % are below 51.2.
    assert chi_square(pairs.flatten(), expected) < 51.2


def test_a_draft_drawn_with_the_same_numbers_mostly_hits_the_same_token() -> None:
    near = TARGET + 0.1 * DRAFT
    hits = 0
    for seed in range(500):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        hits += sampler.draw(near, range(3)) == sampler.draw(TARGET, range(3))
    distance = 0.5 * float((near.softmax(0) - TARGET.softmax(0)).abs().sum())
    # Gumbel-max coupling agrees with probability (1 - d) / (1 + d) at least, d the total variation distance.
    assert hits / 500 > (1 - distance) / (1 + distance) - 0.05


def test_random_numbers_are_uniform_and_depend_on_seed_position_and_token_alone() -> None:
    tokens = torch.arange(50_000)
    numbers = uniform(3, 8, tokens)
    assert torch.equal(numbers[[7, 100]], uniform(3, 8, torch.tensor([7, 100])))
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts = torch.histc(numbers.float(), 20, 0, 1)
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 43.8  # 99.9 % of 19 degrees of freedom
    for other in (uniform(4, 8, tokens), uniform(3, 9, tokens)):
        assert abs(float(torch.corrcoef(torch.stack([numbers, other]))[0, 1])) < 0.02


# -- draft length ----------------------------------------------------------------------------------------------


def drafted(speculation: Speculation, max_tokens: int = 16) -> int:
    draft = Draft(0, PROMPT, Sampler(SAMPLINGS[0]))
    speculation.propose([(draft, max_tokens)], 1)
    return len(draft.draft_tokens)


def costly(rows: int) -> PassCost:
    """A compute-bound machine: rows cost as much as passes."""
    return PassCost(disk_s=0.0, compute_s=1.0 * rows)


def test_free_rows_are_filled_and_costly_ones_are_not() -> None:
    oracle = Oracle([1] * 60, 1000)
    assert drafted(Speculation(StepTimeModel(free_rows), None, oracle)) >= 8
    assert drafted(Speculation(StepTimeModel(costly), None, oracle)) == 0


def test_a_draft_model_that_proposes_nothing_does_not_become_cheap() -> None:
    class Silent(Oracle):
        def propose(self, drafts: object) -> int:
            return 0

    speculation = Speculation(StepTimeModel(free_rows, 0.5), None, Silent([1], 1000))
    assert drafted(speculation) == 0
    assert speculation.step_times.draft_token_s == 0.5


def test_a_slow_draft_model_proposes_fewer_draft_tokens() -> None:
    lengths = [
        drafted(Speculation(StepTimeModel(free_rows, draft_token_s), None, Oracle([1] * 60, 1000)))
        for draft_token_s in (0.01, 0.5, 2)
    ]
    assert lengths[0] > lengths[1] > lengths[2] == 0


def test_a_drafter_that_is_always_rejected_is_soon_no_longer_asked() -> None:
    speculation = Speculation(StepTimeModel(free_rows, 0.3), None, Oracle([1] * 60, 1000))
    assert drafted(speculation) > 1
    for _ in range(40):
        draft = Draft(0, PROMPT, Sampler(SAMPLINGS[0]))
        speculation.propose([(draft, 16)], 1)
        speculation.record_accepted(draft, 0)
        speculation.step_times.record_step(1, 1.0)
    assert drafted(speculation) == 0


def test_acceptance_is_counted_by_position() -> None:
    acceptance = Acceptance()
    for position, accepted in [(0, True), (1, True), (2, False), (0, True), (1, False)]:
        acceptance.record(position, ConfidenceBucket("model", 5), accepted)
    assert acceptance.positions == [(2, 2), (2, 1), (1, 0)]


def test_step_times_follow_measured_passes() -> None:
    step_times = StepTimeModel(free_rows)
    for _ in range(30):
        step_times.record_pass(PassStats(rows=1, start_s=0, seconds=3.0, read_bytes=0, stall_s=2.0, kernel_s=0.9))
    assert step_times.pass_s(1) == pytest.approx(3.0, rel=0.01)
    assert step_times.pass_s(16) > 10  # a row was found to take a second rather than a millisecond


# -- prompt lookup --------------------------------------------------------------------------------------------------


def looked_up(tokens: list[int], count: int = 4) -> list[int]:
    draft = Draft(0, tokens, Sampler(SAMPLINGS[0]))
    lookup = PromptLookup()
    while len(draft.draft_tokens) < count and lookup.propose(draft):
        pass
    return [draft_token.token for draft_token in draft.draft_tokens]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1]),
        ([1, 2, 3, 4], []),
        ([1, 2, 8, 9, 1, 2, 7, 7, 1, 2], [7, 7, 1, 2]),  # the latest of equally long matches
        ([5, 1, 2, 8, 9, 6, 1, 2, 7, 7, 5, 1, 2], [8, 9, 6, 1]),  # the longest match
        ([4, 4, 4], [4, 4, 4, 4]),
        ([256, 1, 65536, 256, 1], [65536, 256, 1, 65536]),  # bytes of neighbouring tokens are no match
        ([7], []),
        ([], []),
    ],
)
def test_prompt_lookup_proposes_the_continuation_of_the_last_occurrence(tokens: list[int], expected: list[int]) -> None:
    assert looked_up(tokens) == expected


def test_a_draft_model_does_not_compute_a_cached_prefix_again(target: Engine, tiny_llama: Path) -> None:
    drafter = ModelDrafter(ModelRunner(target, 2, 64))
    tokens = list(range(3, 33))
    first = Draft(1, tokens, Sampler(SamplingParams(temperature=0)))
    assert drafter.propose([first]) == 30
    drafter.forget(1)
    longer = [*tokens, 7, 8]
    second = Draft(2, longer, Sampler(SamplingParams(temperature=0)))
    assert drafter.propose([second]) == 2
    other = Draft(3, [9, 8, 7], Sampler(SamplingParams(temperature=0)))
    assert drafter.propose([second, other]) >= 3
