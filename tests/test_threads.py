"""One model among threads and processes: calls share the passes, closing waits, forked processes get an error."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace.errors import HeadraceError, UsageError
from headrace.plan import Profile
from headrace.stream import WeightFile
from support.threads import HANG_TIMEOUT_S, Pause, Task
from support.zoo.by_position import SAID, write_alphabet

GREEDY = headrace.SamplingParams(temperature=0)


@pytest.fixture
def path(tmp_path: Path, profile: Profile) -> Path:
    return write_alphabet(tmp_path / "m.gguf")


Load = Callable[..., headrace.Model]


@pytest.fixture
def load(path: Path, profile: Profile) -> Load:
    def loaded(**options: Any) -> headrace.Model:
        return headrace.load(
            path, **{"memory": "4GiB", "context_tokens": 64, "draft": None, "profile": profile, **options}
        )

    return loaded


def ask(model: headrace.Model, **options: Any) -> str:
    return model.generate("hi", **{"sampling": GREEDY, "max_tokens": 20, **options}).text


def is_refused(outcome: object, word: str) -> bool:
    return isinstance(outcome, UsageError) and word in str(outcome)


# -- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [None, "prompt"])
def test_closing_during_a_pass_of_another_thread_waits_for_it(load: Load, draft: str | None) -> None:
    model, pause = load(draft=draft), Pause()
    answering = Task(lambda: ask(model, on_progress=pause))
    pause.reached()
    closing = Task(model.close)
    closing.join(0.2)
    pause.release()
    assert closing.outcome() is None
    assert is_refused(answering.outcome(), "closed")
    assert is_refused(Task(lambda: ask(model)).outcome(), "closed")


def test_closing_during_a_read_of_another_thread_waits_for_it(load: Load) -> None:
    pause, reading = Pause(), threading.Event()

    class Slow(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            if reading.is_set():
                pause()
            return super().read(offset, target, needed)

    model = load(open_file=Slow)
    reading.set()
    answering = Task(lambda: ask(model))
    pause.reached()
    closing = Task(model.close)
    closing.join(0.2)
    pause.release()
    assert closing.outcome() is None
    assert is_refused(answering.outcome(), "closed")


def test_closing_between_two_pieces_of_another_thread_ends_its_stream(load: Load) -> None:
    model, pause = load(), Pause(at=3)
    answering = Task(lambda: ask(model, on_output=pause))
    pause.reached()
    assert Task(model.close).outcome() is None
    pause.release()
    assert is_refused(answering.outcome(), "closed")


def test_two_threads_may_close_and_a_third_load_the_next_model(load: Load) -> None:
    model, pause = load(), Pause()
    answering = Task(lambda: ask(model, on_progress=pause))
    pause.reached()
    closing = [Task(model.close), Task(model.close)]
    other = Task(load)
    for one in (*closing, other):
        one.join(0.1)
    pause.release()
    assert [one.outcome() for one in closing] == [None, None]
    assert is_refused(answering.outcome(), "closed")
    with other.outcome() as loaded:
        assert ask(loaded) == SAID


@pytest.mark.parametrize("argument", ["on_progress", "on_output"])
def test_a_callback_that_closes_its_model_ends_the_answer(load: Load, argument: str) -> None:
    model = load()
    outcome = Task(lambda: ask(model, **{argument: lambda _: model.close()})).outcome()
    assert isinstance(outcome, UsageError)
    model.close()


def test_a_stream_may_be_dropped_after_its_model_was_closed(load: Load) -> None:
    model = load()
    pieces = model.stream("hi", sampling=GREEDY, max_tokens=20)
    next(pieces)
    assert Task(model.close).outcome() is None
    pieces.close()  # type: ignore[attr-defined]


# -- several threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [None, "prompt"])
def test_a_request_during_a_pass_of_another_thread_is_answered(load: Load, draft: str | None) -> None:
    with load(draft=draft) as model:
        pause = Pause()
        first = Task(lambda: ask(model, on_progress=pause))
        pause.reached()
        others = [Task(lambda: ask(model)) for _ in range(2)]
        for one in others:
            one.join(0.1)
        pause.release()
        assert first.outcome() == SAID
        assert [one.outcome() for one in others] == [SAID, SAID]
        assert ask(model) == SAID


def test_a_request_between_two_pieces_of_another_thread_is_answered(load: Load) -> None:
    with load(sequences=2) as model:
        pause = Pause(at=3)
        first = Task(lambda: ask(model, on_output=pause))
        pause.reached()
        other = Task(lambda: ask(model))
        other.join(0.1)
        pause.release()
        assert first.outcome() == SAID
        assert other.outcome() == SAID


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_stream_that_takes_its_first_job_late_is_not_mixed_with_another(load: Load, sequences: int) -> None:
    with load(sequences=sequences) as model:
        job = headrace.Request(token_ids=model.encode("hi"), max_tokens=20, sampling=GREEDY)
        late, pause = Pause(), Pause()

        def jobs() -> Iterator[headrace.Request]:
            late()
            yield job

        first = Task(lambda: "".join(piece.text for piece in model.stream_requests(jobs())))
        late.reached()  # the stream is open, and has added no job yet
        second = Task(lambda: ask(model, on_progress=pause))
        second.join(0.1)
        late.release()
        first.join(0.1)
        pause.release()
        assert [first.outcome(), second.outcome()] == [SAID, SAID]
        assert ask(model) == SAID


def test_a_callback_may_ask_the_same_model(load: Load) -> None:
    with load() as model:
        for argument in ("on_progress", "on_output"):
            answers: list[str] = []

            def again(_: object, answers: list[str] = answers) -> None:
                answers.append(ask(model))

            assert Task(lambda argument=argument, again=again: ask(model, **{argument: again})).outcome() == SAID
            assert answers
            assert set(answers) == {SAID}


def test_a_stream_may_be_read_by_one_thread_after_another(load: Load) -> None:
    with load() as model:
        pieces = model.stream("hi", sampling=GREEDY, max_tokens=20)
        first = Task(lambda: next(pieces)).outcome()
        rest = Task(lambda: list(pieces)).outcome()
        assert first.text + "".join(piece.text for piece in rest) == SAID


def test_two_models_answer_at_once(load: Load) -> None:
    with load() as one, load() as other:
        tasks = [Task(lambda model=model: [ask(model) for _ in range(5)]) for model in (one, other)]
        assert [task.outcome() for task in tasks] == [[SAID] * 5] * 2


@pytest.mark.stress
@pytest.mark.parametrize("draft", [None, "prompt"])
def test_many_threads_and_a_close_at_any_moment(load: Load, draft: str | None) -> None:
    for round_number in range(25):
        model = load(draft=draft, sequences=1 + round_number % 2)
        start = threading.Barrier(5)

        def many(model: headrace.Model = model, start: threading.Barrier = start) -> list[object]:
            start.wait()
            found: list[object] = []
            for _ in range(20):
                try:
                    found.append(ask(model))
                except HeadraceError as error:
                    found.append(error)
            return found

        tasks = [Task(many) for _ in range(4)]
        start.wait()
        time.sleep(0.002 * round_number)  # any moment will do
        model.close()
        for task in tasks:
            outcome = task.outcome()
            assert isinstance(outcome, list), outcome
            assert all(one == SAID or isinstance(one, UsageError) for one in outcome)


# -- processes --------------------------------------------------------------------------------------------------------


def forked(call: Callable[[], object]) -> str:
    """The outcome of a call in a forked process, as text; it must not hang there."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(int(HANG_TIMEOUT_S))
            try:
                said = str(call())
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writer, said.encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], HANG_TIMEOUT_S / 3)
    said = os.read(reader, 4000).decode() if ready else "the call hangs"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("draft", [None, "prompt"])
def test_a_process_forked_after_load_is_told_that_it_cannot_generate(load: Load, draft: str | None, used: bool) -> None:
    with load(draft=draft) as model:
        if used:
            assert ask(model) == SAID
        said = forked(lambda: ask(model))
        assert said.startswith("UsageError")
        assert "fork" in said or "process" in said
        assert ask(model) == SAID  # the parent still works


def test_a_stream_does_not_go_on_in_a_forked_process(load: Load) -> None:
    with load() as model:
        pieces = model.stream("hi", sampling=GREEDY, max_tokens=20)
        first = next(pieces)
        assert forked(lambda: list(pieces)).startswith("UsageError")
        assert first.text + "".join(piece.text for piece in pieces) == SAID


def test_a_forked_process_may_close_its_copy(load: Load) -> None:
    with load() as model:
        ask(model)
        assert forked(model.close) == "None"
        assert ask(model) == SAID
        assert forked(lambda: (model.close(), ask(model))).startswith("UsageError")


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_forked_process_loads_a_model_of_its_own_or_is_told_that_it_cannot(load: Load, closed: bool) -> None:
    with load() as model:
        ask(model)
        if closed:
            model.close()
        said = forked(lambda: ask(load()))
        assert said == SAID or (said.startswith("UsageError") and ("fork" in said or "process" in said))


def test_a_forked_process_may_count_tokens(load: Load) -> None:
    with load() as model:
        assert forked(lambda: model.encode("hi")) == str(model.encode("hi"))
