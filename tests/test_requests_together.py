"""Requests of several threads and tasks share the passes of one model; each succeeds or fails by itself."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

import headrace
from headrace.engine.request import Event, Progress, RequestError
from headrace.errors import ContextError, ReadError, UsageError
from headrace.plan import Profile
from headrace.stream import WeightFile
from support.threads import Pause, Task
from support.zoo.by_position import SAID, write_alphabet

GREEDY = headrace.SamplingParams(temperature=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_alphabet(tmp_path / "m.gguf")


@pytest.fixture
def model(path: Path, profile: Profile) -> Iterator[headrace.Model]:
    with headrace.load(path, memory="4GiB", context_tokens=64, draft=None, sequences=4, profile=profile) as loaded:
        yield loaded


class Broken(Exception):
    pass


def ended(events: "SimpleQueue[Event]") -> tuple[str, Event]:
    """The text of a request, and its last event."""
    text = ""
    while True:
        event = events.get(timeout=30)
        if isinstance(event, RequestError):
            return text, event
        if isinstance(event, headrace.RequestOutput):
            text += event.text
            if event.finish_reason is not None:
                return text, event


def test_a_request_joins_while_another_is_answered_and_leaves_before_it(model: headrace.Model) -> None:
    gate = Pause()
    first, second = SimpleQueue[Event](), SimpleQueue[Event]()
    one_token: list[Event] = []

    def hold(event: Event) -> None:  # on the thread that runs the passes: the first request stays in the middle
        first.put(event)
        one_token.append(event)
        gate(event)

    model.add_request(model.request("hi", sampling=GREEDY, max_tokens=20), hold)
    gate.reached()
    model.add_request(model.request("hi", sampling=GREEDY, max_tokens=2), second.put)
    assert len(one_token) == 1
    gate.release()
    assert ended(second)[0] == SAID[:2]
    text, last = ended(first)
    assert text == SAID
    assert isinstance(last, headrace.RequestOutput)
    together = [stats for stats in model.passes if stats.rows > 1]
    assert together, "prompts and decoded tokens shared passes"


def test_an_error_in_one_request_ends_only_that_request(model: headrace.Model) -> None:
    broken = headrace.SamplingParams(temperature=1, seed=3)
    object.__setattr__(broken, "seed", "x")  # fails when it draws
    good, bad = SimpleQueue[Event](), SimpleQueue[Event]()
    model.add_request(model.request("hi", sampling=GREEDY), good.put)
    model.add_request(model.request("hi", sampling=broken), bad.put)
    assert isinstance(ended(bad)[1], RequestError)
    assert ended(good)[0] == SAID
    assert model.generate("hi", sampling=GREEDY).text == SAID


def test_a_failed_pass_fails_its_requests_and_leaves_the_model_usable(path: Path, profile: Profile) -> None:
    fails = threading.Event()

    class Failing(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            if fails.is_set():
                raise ReadError("the disk fails", hint="replace it")
            return super().read(offset, target, needed)

    with headrace.load(
        path, memory="4GiB", context_tokens=64, draft=None, sequences=2, profile=profile, open_file=Failing
    ) as model:
        fails.set()
        queues = [SimpleQueue[Event]() for _ in range(4)]
        for queue in queues:
            model.add_request(model.request("hi", sampling=GREEDY), queue.put)
        for queue in queues:
            _, last = ended(queue)
            assert isinstance(last, RequestError)
            assert isinstance(last.error, ReadError)
        fails.clear()
        assert [one.text for one in model.generate(["hi", "hi"], sampling=GREEDY)] == [SAID, SAID]


def test_results_that_are_not_finite_fail_only_their_request(
    model: headrace.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model._engine._forward_in_order

    def damaged(batch: Any, starts: Any, state: Any) -> torch.Tensor:
        logits = forward(batch, starts, state).clone()
        parts = torch.split(logits, [rows.logits for rows in batch])
        for rows, part in zip(batch, parts, strict=True):
            if rows.cache is bad_cache:
                part.fill_(torch.nan)
        return logits

    runner = model._llm_engine.runner
    bad_cache = runner._caches[1]
    monkeypatch.setattr(model._engine, "_forward_in_order", damaged)
    gate, good, bad = Pause(), SimpleQueue[Event](), SimpleQueue[Event]()

    def hold(event: Event) -> None:
        good.put(event)
        gate(event)

    model.add_request(model.request("hi", sampling=GREEDY), hold)
    gate.reached()  # the first request has slot 0, so the second gets slot 1
    model.add_request(model.request("hi", sampling=GREEDY), bad.put)
    gate.release()
    _, last = ended(bad)
    assert isinstance(last, RequestError)
    assert "not finite" in str(last.error)
    assert ended(good)[0] == SAID


def test_an_aborted_request_frees_its_slot(path: Path, profile: Profile) -> None:
    with headrace.load(path, memory="4GiB", context_tokens=64, draft=None, profile=profile) as model:
        gate, events = Pause(), SimpleQueue[Event]()

        def hold(event: Event) -> None:
            events.put(event)
            gate(event)

        number = model.add_request(model.request("hi", sampling=GREEDY), hold)
        gate.reached()
        model.abort(number)
        gate.release()
        assert model.generate("hi", sampling=GREEDY).text == SAID
        assert events.qsize() == 1, "no output after the abort"
        model.abort(number)  # again


def test_requests_that_do_not_fit_are_refused_when_they_are_added(model: headrace.Model) -> None:
    def add(token_ids: list[int], **options: Any) -> None:
        sampling = headrace.SamplingParams(temperature=0, **options)
        model.add_request(headrace.Request(token_ids=token_ids, sampling=sampling), lambda _: None)

    with pytest.raises(UsageError, match="embeddings"):
        add([10**6])
    with pytest.raises(ContextError):
        add([5] * 64)
    with pytest.raises(UsageError, match="logit_bias"):
        add([5], logit_bias={10**6: 1.0})
    assert model.generate("hi", sampling=GREEDY).text == SAID


def test_statistics_are_those_of_each_request(model: headrace.Model) -> None:
    gate = Pause()
    long, short = SimpleQueue[Event](), SimpleQueue[Event]()

    def hold(event: Event) -> None:
        long.put(event)
        gate(event)

    model.add_request(model.request("hi", sampling=GREEDY), hold)
    gate.reached()
    model.add_request(model.request("hi", sampling=GREEDY, max_tokens=3), short.put)
    gate.release()
    ends = {name: ended(queue)[1] for name, queue in (("long", long), ("short", short))}
    for name, tokens in (("long", len(SAID) + 1), ("short", 3)):
        end = ends[name]
        assert isinstance(end, headrace.RequestOutput)
        stats = end.stats
        assert stats.prefill.tokens == 1
        assert stats.prefill.tokens + stats.decode.tokens == tokens
        assert stats.decode.passes == tokens - 1
        assert 0 <= stats.queue_s <= stats.ttft_s <= stats.last_token_s
        assert sum(stats.decode.bound_by.values()) == stats.decode.passes


def test_progress_is_that_of_each_prompt(model: headrace.Model) -> None:
    seen: list[list[Progress]] = [[], []]
    tasks = [Task(lambda own=own: model.generate("hi", sampling=GREEDY, on_progress=own.append)) for own in seen]
    for task in tasks:
        assert task.outcome().text == SAID
    for own in seen:
        assert own
        assert all(1 <= one.done <= one.steps and 1 <= one.pass_number <= one.passes for one in own)


# -- asyncio ----------------------------------------------------------------------------------------------------------


def test_tasks_share_the_passes_of_one_model(path: Path, profile: Profile) -> None:
    async def ask() -> tuple[list[str], int]:
        options: dict[str, Any] = {"memory": "4GiB", "context_tokens": 64, "draft": None, "profile": profile}
        async with await headrace.AsyncLLM.load(str(path), sequences=4, **options) as llm:
            answers = await asyncio.gather(*[llm.generate("hi", sampling=GREEDY) for _ in range(6)])
            return [answer.text for answer in answers], len(llm.model.passes)

    texts, passes = asyncio.run(ask())
    assert texts == [SAID] * 6
    assert passes < 6 * len(SAID)


def test_a_cancelled_task_ends_its_request_and_an_error_reaches_its_task(path: Path, profile: Profile) -> None:
    async def ask() -> list[str]:
        options: dict[str, Any] = {"memory": "4GiB", "context_tokens": 64, "draft": None, "profile": profile}
        async with await headrace.AsyncLLM.load(str(path), **options) as llm:
            async for output in llm.stream("hi", sampling=GREEDY):
                assert output.text == SAID[0]
                break  # closes the stream
            with pytest.raises(UsageError, match="embeddings"):
                await anext(llm.stream_request(headrace.Request(token_ids=[10**6], sampling=GREEDY)))
            task = asyncio.create_task(llm.generate("hi", sampling=GREEDY))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return [(await llm.generate("hi", sampling=GREEDY)).text]

    assert asyncio.run(ask()) == [SAID]


def test_closing_ends_a_waiting_task_with_an_error(path: Path, profile: Profile) -> None:
    async def ask() -> None:
        options: dict[str, Any] = {"memory": "4GiB", "context_tokens": 64, "draft": None, "profile": profile}
        llm = await headrace.AsyncLLM.load(str(path), **options)
        stream = llm.stream("hi", sampling=GREEDY)
        text, error = (await anext(stream)).text, ""
        await llm.close()
        try:
            async for output in stream:
                text += output.text
        except UsageError as caught:
            error = str(caught)
        assert "closed" in error or text == SAID  # unless it had ended before
        with pytest.raises(UsageError, match="closed"):
            await llm.generate("hi", sampling=GREEDY)

    asyncio.run(ask())


@pytest.mark.parametrize("at", ["output", "progress"])
def test_a_sink_that_raises_ends_only_its_request(model: headrace.Model, at: str) -> None:
    def raises(event: Event) -> None:
        if isinstance(event, Progress) == (at == "progress"):
            raise Broken

    good = SimpleQueue[Event]()
    model.add_request(model.request("hi", sampling=GREEDY), raises, wants_progress=True)
    model.add_request(model.request("hi", sampling=GREEDY), good.put)
    assert ended(good)[0] == SAID
    assert model.generate("hi", sampling=GREEDY).text == SAID


def test_a_sink_may_close_the_model(path: Path, profile: Profile) -> None:
    model = headrace.load(path, memory="4GiB", context_tokens=64, draft=None, sequences=2, profile=profile)
    other = SimpleQueue[Event]()
    model.add_request(model.request("hi", sampling=GREEDY), lambda _: model.close(), wants_progress=True)
    model.add_request(model.request("hi", sampling=GREEDY), other.put)
    assert isinstance(ended(other)[1], RequestError)
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.generate("hi", sampling=GREEDY)
