"""A request that fails, is dropped or is interrupted at any point leaves the model usable for the next one."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

import headrace
import headrace.api
import headrace.engine.engine_thread
from headrace.cli import main
from headrace.errors import HeadraceError, UsageError
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from support.zoo.by_position import SAID, write_alphabet
from support.zoo.scripted import NORMAL, byte_level, in_turn, write_scripted

GREEDY = headrace.SamplingParams(temperature=0)
VOCABULARY = byte_level(more=[("hello", NORMAL)])
NUMBER = VOCABULARY["tokens"].index
UNTRACED = pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger or a coverage tool traces this run")


@pytest.fixture
def path(tmp_path: Path, profile: Profile) -> Path:
    return write_alphabet(tmp_path / "m.gguf", VOCABULARY)


@pytest.fixture
def model(path: Path, profile: Profile) -> Iterator[headrace.Model]:
    with headrace.load(path, memory="4GiB", context_tokens=64, draft=None, profile=profile) as loaded:
        yield loaded


@pytest.fixture(params=[None, "prompt"], ids=["plain", "draft"])
def either(path: Path, profile: Profile, request: pytest.FixtureRequest) -> Iterator[headrace.Model]:
    """A model, without and with draft tokens."""
    with headrace.load(path, memory="4GiB", context_tokens=64, draft=request.param, profile=profile) as loaded:
        yield loaded


def answers_as_ever(model: headrace.Model) -> None:
    answer = model.generate("hi", sampling=GREEDY, max_tokens=20)
    assert (answer.text, answer.finish_reason) == (SAID, "stop")


# -- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"stop": 5}, {"stop": [5]}, {"stop": ["x", None]}, {"stop": {"x": 1}.items()}, {"stop": b"x"},
        {"sampling": {"temperature": 0}}, {"sampling": 0.5}, {"sampling": "greedy"},
        {"max_tokens": "5"}, {"max_tokens": 2.5}, {"max_tokens": float("nan")}, {"max_tokens": [5]},
        {"on_progress": 5}, {"on_output": 5}, {"raw": True, "prompt": ""}, {"unknown": 1},
        {"prompt": 5}, {"prompt": None}, {"prompt": ["hi", 5]}, {"prompt": [{"role": "user"}]}, {"prompt": b"hi"},
        {"prompt": [{"role": "user", "content": "x" * 1000}]}, {"prompt": ["hi", "x" * 1000]},
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_is_refused_leaves_the_model_usable(model: headrace.Model, options: dict[str, Any]) -> None:
    with pytest.raises((HeadraceError, TypeError, ValueError)):
        model.generate(**{"prompt": "hi", "sampling": GREEDY, "max_tokens": 20, **options})
    answers_as_ever(model)


@pytest.mark.parametrize("wrong", [5, [5], ["x", None], b"x"], ids=str)
def test_stop_strings_that_are_no_text_are_a_usage_error(model: headrace.Model, wrong: Any) -> None:
    with pytest.raises(UsageError, match="stop"):
        model.generate("hi", stop=wrong, max_tokens=3)


@pytest.mark.parametrize(
    "wrong", [{"temperature": "hot"}, {"top_k": "many"}, {"top_k": 2.5}, {"top_p": None}, {"seed": "x"}, {"seed": 1.5}], ids=str
)  # fmt: skip
def test_settings_of_a_wrong_type_are_refused_and_leave_the_model_usable(
    model: headrace.Model, wrong: dict[str, Any]
) -> None:
    with pytest.raises((UsageError, TypeError)):
        model.generate("hi", sampling=headrace.SamplingParams(**wrong), max_tokens=3)
    answers_as_ever(model)


def test_settings_that_fail_only_when_drawing_leave_the_model_usable(model: headrace.Model) -> None:
    sampling = headrace.SamplingParams(temperature=1, seed=3)
    object.__setattr__(sampling, "seed", "x")  # like any failure between a pass and its token
    with pytest.raises((HeadraceError, TypeError)):
        model.generate("hi", sampling=sampling, max_tokens=3)
    answers_as_ever(model)


# -- requests that break off ------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("argument", ["on_progress", "on_output"])
@pytest.mark.parametrize("calls", [1, 4])
def test_a_callback_that_raises_leaves_the_model_usable(
    either: headrace.Model, argument: str, calls: int, error: type[BaseException]
) -> None:
    made = []

    def callback(_: object) -> None:
        made.append(1)
        if len(made) == calls:
            raise error

    with pytest.raises(error):
        either.generate("hi", sampling=GREEDY, max_tokens=20, **{argument: callback})
    answers_as_ever(either)


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_stream_that_is_dropped_half_way_leaves_the_model_usable(either: headrace.Model, pieces: int) -> None:
    stream = either.stream("hi", sampling=GREEDY, max_tokens=20)
    for _ in range(pieces):
        next(stream)
    del stream
    answers_as_ever(either)


def test_a_stream_that_was_never_begun_is_not_open(model: headrace.Model) -> None:
    first = model.stream("hi", sampling=GREEDY, max_tokens=20)
    answers_as_ever(model)
    assert "".join(piece.text for piece in first) == SAID


def test_an_exception_thrown_into_a_stream_leaves_the_model_usable(model: headrace.Model) -> None:
    stream = model.stream("hi", sampling=GREEDY, max_tokens=20)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    answers_as_ever(model)


def test_jobs_that_fail_while_others_answer_leave_the_model_usable(path: Path, profile: Profile) -> None:
    with headrace.load(path, memory="4GiB", context_tokens=64, draft=None, sequences=2, profile=profile) as model:
        job = headrace.Request(token_ids=model.encode("hi"), max_tokens=20, sampling=GREEDY)

        def jobs(wrong: Callable[[], headrace.Request]) -> Iterator[headrace.Request]:
            yield job
            yield wrong()

        def beyond() -> headrace.Request:
            return headrace.Request(token_ids=[*job.token_ids, 10**6], max_tokens=3, sampling=GREEDY)

        def negative() -> headrace.Request:
            return headrace.Request(token_ids=[-1], max_tokens=3, sampling=GREEDY)

        def wrong_stop() -> headrace.Request:
            return headrace.Request(token_ids=job.token_ids, max_tokens=3, sampling=GREEDY, stop=[5])  # type: ignore[list-item]

        def empty() -> headrace.Request:
            return headrace.Request(token_ids=[], max_tokens=3, sampling=GREEDY)

        def too_long() -> headrace.Request:
            return headrace.Request(token_ids=job.token_ids * 20, max_tokens=3, sampling=GREEDY)

        def broken() -> headrace.Request:
            raise Broken

        for wrong in (beyond, negative, wrong_stop, empty, too_long, broken):
            with pytest.raises((HeadraceError, TypeError, ValueError, Broken)):
                list(model.stream_requests(jobs(wrong)))
            answers_as_ever(model)


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


class Lines:
    """Counts the lines that run in some modules, and raises KeyboardInterrupt at one of them, as Ctrl-C there does."""

    def __init__(self, file: str, at: int = 0):
        self.seen: list[int] = []
        self._file = file
        self._at = at

    def __enter__(self) -> "Lines":
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename == self._file else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.seen.append(frame.f_lineno)
            if len(self.seen) == self._at:
                raise KeyboardInterrupt
        return self._line


@UNTRACED
@pytest.mark.parametrize(
    "module",
    [headrace.api, headrace.engine.engine_thread],
)
def test_ctrl_c_at_any_line_leaves_the_model_usable(either: headrace.Model, module: Any) -> None:
    file = str(module.__file__)
    with Lines(file) as whole:
        either.generate("hi", sampling=GREEDY, max_tokens=3)
    assert len(whole.seen) > 8
    first = {line: at for at, line in reversed([*enumerate(whole.seen, 1)])}
    last = {line: at for at, line in enumerate(whole.seen, 1)}
    for at in sorted({*first.values(), *last.values()}):
        with Lines(file, at), suppress(KeyboardInterrupt):
            either.generate("hi", sampling=GREEDY, max_tokens=3)
        try:
            answers_as_ever(either)
        except (HeadraceError, AssertionError, IndexError, ValueError) as error:
            pytest.fail(f"after Ctrl-C at {Path(file).name}:{whole.seen[at - 1]}: {error!r}")


def test_ctrl_c_in_a_chat_ends_only_the_answer(
    tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_profile(profile)
    follows = in_turn(NUMBER(bytes_of("\n")), *(NUMBER(one) for one in SAID), NUMBER("<|im_end|>"))
    path = write_scripted(tmp_path / "m.gguf", **VOCABULARY, eos=NUMBER("<|im_end|>"), follows=follows)
    real, lines = headrace.Model.stream, iter(["hi", "hi", "/exit"])

    def once_interrupted(model: headrace.Model, *arguments: Any, **options: Any) -> Iterator[headrace.RequestOutput]:
        monkeypatch.setattr(headrace.Model, "stream", real)
        for number, piece in enumerate(real(model, *arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(headrace.Model, "stream", once_interrupted)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("headrace.cli.run._read_prompt", lambda *_: None)  # a terminal without piped input
    result = CliRunner().invoke(main, ["run", str(path), "-t", "0", "--memory", "4GiB", "-q"])
    assert (result.exit_code, result.stdout) == (0, f"ab\n{SAID}\n")


def bytes_of(text: str) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return "".join(bytes_to_unicode()[byte] for byte in text.encode())
