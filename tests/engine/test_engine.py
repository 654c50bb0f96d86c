"""Invariants of a step: streamed equals resident bit for bit, and sequences do not touch each other."""

from pathlib import Path

import pytest
import torch

from headrace.checkpoint import open_checkpoint
from headrace.engine import Rows, Trace
from headrace.errors import ContextError, ReadError
from headrace.kernels import Kernels
from headrace.stream import WeightFile
from support.engines import PROMPT, build_engine, greedy_logits
from support.zoo.gguf_files import random_model, write_gguf


@pytest.fixture(scope="module")
def resident(tiny_llama: Path) -> torch.Tensor:
    with build_engine(tiny_llama, share=1.0) as engine:
        return greedy_logits(engine)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("unit_bytes", "slots"), [(1, 1), (9000, 2), (64 << 10, 8)])
@pytest.mark.parametrize("readers", [0, 1, 4])
def test_streamed_logits_equal_resident_ones_bit_for_bit(
    tiny_llama: Path, resident: torch.Tensor, share: float, unit_bytes: int, slots: int, readers: int
) -> None:
    # unit_bytes=1 makes every row a separate unit: every tensor is then larger than the ring.
    with build_engine(
        tiny_llama, share=share, options={"unit_bytes": unit_bytes, "slots": slots, "readers": readers}
    ) as engine:
        assert torch.equal(greedy_logits(engine), resident)


def test_two_threads_give_the_bits_of_one(tiny_llama: Path, resident: torch.Tensor) -> None:
    with build_engine(tiny_llama, Kernels(2)) as engine:
        assert torch.equal(greedy_logits(engine), resident)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_mapped_pinned_rows_give_the_same_logits(tiny_llama: Path, resident: torch.Tensor, share: float) -> None:
    with build_engine(tiny_llama, share=share, options={"map_pinned": True}) as engine:
        assert torch.equal(greedy_logits(engine), resident)
        assert str(tiny_llama) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("limit", "reuses"), [(None, True), (1 << 20, False)])
def test_prefill_memory_holds_weights_during_decode(
    tiny_llama: Path, limit: int | None, reuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of 1 MiB it is not reused: the process has not returned enough. Memory is collected once after a prompt."""
    collected: list[int] = []
    monkeypatch.setattr("headrace.engine.engine.release_unused", lambda: collected.append(1))

    def conversation(reused: float) -> tuple[torch.Tensor, list[bool], list[int]]:
        options = {"memory_limit_bytes": limit, "decode_only_slots": 2 if reused else 0, "readers": 0}
        logits, held = [], []
        # Multiples of 16: torch's order of summation for a prompt row may depend on the rows left over at a cut.
        with build_engine(tiny_llama, share=0.3, decode_share=reused, row_multiple=16, options=options) as engine:
            cache = engine.new_cache(160)
            for tokens in (PROMPT * 3, [1], [2], [3], PROMPT * 3, [4], [5], [6]):
                logits.append(engine.step([Rows(cache=cache, tokens=tokens)]))
                held.append(engine.stream.reuses_prefill_memory)
            return torch.cat(logits), held, [one.read_bytes for one in engine.passes]

    plain, _, _ = conversation(0.0)
    logits, held, read = conversation(0.4)
    assert torch.equal(logits, plain)
    assert held == [False, reuses, reuses, reuses] * 2
    assert (read[3] < read[4]) == reuses
    assert len(collected) == 2


def test_sequences_in_one_step_equal_sequences_alone(tiny_llama: Path) -> None:
    prompts = [PROMPT[:4], PROMPT[4:5], PROMPT[5:]]
    with build_engine(tiny_llama) as engine:
        alone = []
        for prompt in prompts:
            cache = engine.new_cache(32)
            first = engine.step([Rows(cache=cache, tokens=prompt, logits=len(prompt))])
            alone.append(torch.cat([first, engine.step([Rows(cache=cache, tokens=[1, 2], logits=2)])]))
        caches = [engine.new_cache(32) for _ in prompts]
        first = engine.step([Rows(cache=c, tokens=p, logits=len(p)) for c, p in zip(caches, prompts, strict=True)])
        second = engine.step([Rows(cache=c, tokens=[1, 2], logits=2) for c in caches])
    start = 0
    for i, prompt in enumerate(prompts):
        together = torch.cat([first[start : start + len(prompt)], second[2 * i : 2 * i + 2]])
        assert torch.equal(together, alone[i])
        start += len(prompt)


def test_truncated_positions_leave_no_trace(tiny_llama: Path) -> None:
    with build_engine(tiny_llama) as engine:
        cache = engine.new_cache(32)
        engine.step([Rows(cache=cache, tokens=PROMPT[:5])])
        expected = engine.step([Rows(cache=cache, tokens=[8])])
        engine.step([Rows(cache=cache, tokens=[1, 2, 3])])
        cache.truncate(5)
        assert torch.equal(engine.step([Rows(cache=cache, tokens=[8])]), expected)


def test_rows_that_do_not_fit_are_refused_before_anything_is_computed(tiny_llama: Path) -> None:
    with build_engine(tiny_llama) as engine:
        cache = engine.new_cache(4)
        with pytest.raises(ContextError, match="do not fit"):
            engine.step([Rows(cache=cache, tokens=[1] * 5)])
        assert cache.length == 0
        assert not engine.passes


class FailsOnce:
    """A file that fails at one read and works again after."""

    count = 0

    def __init__(self, path: str):
        self._file = WeightFile(path)

    def read(self, offset: int, target: memoryview, needed: int) -> int:
        FailsOnce.count += 1
        if FailsOnce.count == 60:
            raise ReadError("reading failed: Input/output error")
        return self._file.read(offset, target, needed)

    def close(self) -> None:
        self._file.close()


def test_after_a_read_error_the_next_step_starts_afresh(tiny_llama: Path, resident: torch.Tensor) -> None:
    FailsOnce.count = 0
    with build_engine(tiny_llama, share=0.3, open_file=FailsOnce) as engine:
        cache = engine.new_cache(64)
        with pytest.raises(ReadError):
            for _ in range(20):
                engine.step([Rows(cache=cache, tokens=[1])])
        assert torch.equal(greedy_logits(engine), resident)


def test_an_interrupt_while_a_pass_is_aborted_does_not_break_the_next(
    tiny_llama: Path, resident: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_engine(tiny_llama, share=0.3) as engine:
        rewind, interrupts = engine.stream.rewind, iter([KeyboardInterrupt])

        def interrupted() -> None:
            for interrupt in interrupts:
                raise interrupt
            rewind()

        def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine.stream, "rewind", interrupted)
            patch.setattr(engine, "on_progress", stopped)
            with pytest.raises(KeyboardInterrupt):
                engine.step([Rows(cache=engine.new_cache(64), tokens=[1, 2])])
        engine.on_progress = None
        assert torch.equal(greedy_logits(engine), resident)


def test_replayed_passes_report_progress(tiny_llama: Path) -> None:
    with build_engine(tiny_llama, share=0.3) as engine:
        seen: list[tuple[int, int]] = []
        engine.on_progress = lambda done, steps: seen.append((done, steps))
        cache = engine.new_cache(64)
        for _ in range(6):
            seen.clear()
            engine.step([Rows(cache=cache, tokens=[1])])
            assert seen == [(i + 1, len(engine.weights.steps)) for i in range(len(engine.weights.steps))]


def test_cached_embedding_rows_stay_within_a_bound(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(t for t in open_checkpoint(tiny_llama).tensors.values() if t.name == "token_embd.weight").row_bytes
    monkeypatch.setattr("headrace.engine.tensor_reader.MAX_CACHED_ROW_BYTES", 5 * row + 1)
    with build_engine(tiny_llama, share=0.3) as engine:
        cache = engine.new_cache(128)
        for token in (*range(40), 39, 38):
            engine.step([Rows(cache=cache, tokens=[token])])
        assert sum(kept.nbytes for kept in engine._eager.parts.reader._rows_read.values()) == 5 * row
        assert [token for _, token in engine._eager.parts.reader._rows_read] == [35, 36, 37, 39, 38]


def test_the_trace_has_reads_matmuls_and_passes(tiny_llama: Path, tmp_path: Path) -> None:
    trace = Trace()
    with build_engine(tiny_llama, share=0.3, trace=trace) as engine:
        greedy_logits(engine, 2)
        passes = engine.passes
    kinds = {event.get("cat") for event in trace.events()}
    assert {"read", "compute", "pass"} <= kinds
    assert abs(sum(end - start for start, end in trace.spans("pass")) - sum(p.seconds for p in passes)) < 0.01
    trace.write(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").read_text().startswith('{"traceEvents"')


def test_every_pass_reads_the_streamed_bytes_and_no_more(tiny_llama: Path) -> None:
    with build_engine(tiny_llama, share=0.3, options={"readers": 0}) as engine:
        greedy_logits(engine, 3)
        streamed = engine.stream.layout.streamed_bytes  # in whole pages, of which the file's last may be short
        assert [p.read_bytes for p in engine.passes[1:]] == pytest.approx([streamed] * 3, abs=4096)
        assert engine.passes[1].read_bytes <= streamed


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_repacked_weights_give_the_same_model_and_rows_stay_row_invariant(
    tmp_path: Path, share: float, in_place: bool
) -> None:
    path = write_gguf(random_model("llama"), "llama", tmp_path / "tiny.gguf", "Q4_0")
    with build_engine(path, share=share) as engine:
        plain = greedy_logits(engine)
    options = {"repacked_types": frozenset({"Q4_0"}), "repack_in_place": in_place}
    with build_engine(path, share=share, row_multiple=8, options=options) as engine:
        assert (greedy_logits(engine) - plain).norm() / plain.norm() < 0.05  # activations are rounded differently
        together = engine.step(
            [Rows(cache=engine.new_cache(40), tokens=[*PROMPT, *PROMPT], logits=26, row_invariant=True)]
        )
        cache = engine.new_cache(40)
        alone = torch.cat([engine.step([Rows(cache=cache, tokens=[token])]) for token in [*PROMPT, *PROMPT]])
        assert torch.equal(together, alone)
        prefill = engine.step([Rows(cache=engine.new_cache(64), tokens=PROMPT * 4, logits=52, row_invariant=False)])
        assert (prefill[:26] - together).norm() / together.norm() < 0.08


@pytest.mark.parametrize("rows", [1, 5])
def test_an_8_bit_kv_cache_gives_nearly_the_logits_of_16_bits(tiny_llama: Path, rows: int) -> None:
    tokens = PROMPT[:10]
    with build_engine(tiny_llama) as engine:
        logits = []
        for bits in (16, 8):
            cache = engine.new_cache(32, bits)
            parts = [tokens[i : i + rows] for i in range(0, len(tokens), rows)]
            logits.append(torch.cat([engine.step([Rows(cache=cache, tokens=p, logits=len(p))]) for p in parts]))
            cache.truncate(4)
            again = engine.step([Rows(cache=cache, tokens=tokens[4:], logits=6)])
            assert torch.equal(again, logits[-1][4:])
            other = engine.new_cache(32, bits)
            other.copy_prefix(cache, 7)
            assert torch.equal(engine.step([Rows(cache=other, tokens=tokens[7:], logits=3)]), logits[-1][7:])
    assert 0 < (logits[0] - logits[1]).norm() / logits[0].norm() < 0.05


def test_a_prefix_is_shared_within_the_pass_that_computes_it(tiny_llama: Path) -> None:
    whole = [(11 * i) % 300 for i in range(40)]
    with build_engine(tiny_llama) as engine:
        alone = engine.step([Rows(cache=engine.new_cache(64), tokens=whole)])
        first, second, third = (engine.new_cache(64) for _ in range(3))
        second.copy_prefix(first, 30)
        third.copy_prefix(second, 38)  # which is itself copied in this pass
        batch = [
            Rows(cache=first, tokens=whole[:35]),  # prefill rows, computed after the row-invariant ones
            Rows(cache=second, tokens=whole[30:39]),
            Rows(cache=third, tokens=whole[38:]),
        ]
        logits = engine.step(batch)
        assert (first.length, second.length, third.length) == (35, 39, 40)
        assert (logits[2] - alone[0]).norm() / alone[0].norm() < 0.05  # the prefix went through other kernels
        assert engine.passes[-1].rows == 35 + 9 + 2


def test_a_failed_pass_rolls_back_a_shared_prefix(tiny_llama: Path) -> None:
    class Failing(WeightFile):
        armed = False

        def read(self, offset: int, target: memoryview, needed: int) -> int:
            if Failing.armed and needed < len(target):
                raise ReadError("gone")
            return super().read(offset, target, needed)

    with build_engine(tiny_llama, open_file=Failing) as engine:
        source = engine.new_cache(32)
        engine.step([Rows(cache=source, tokens=PROMPT)])
        cache = engine.new_cache(32)
        engine.step([Rows(cache=cache, tokens=PROMPT[:3])])
        cache.copy_prefix(source, 8)
        Failing.armed = True
        with pytest.raises(ReadError):
            engine.step([Rows(cache=cache, tokens=[1])])
        Failing.armed = False
        assert cache.length == 3
        expected = engine.new_cache(32)
        again = engine.step([Rows(cache=cache, tokens=PROMPT[3:6])])
        assert torch.equal(again, engine.step([Rows(cache=expected, tokens=PROMPT[:6])]))


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_attention_over_some_heads_at_a_time_equals_attention_over_all(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(random_model(family), family, tmp_path / "tiny.gguf")
    found = []
    for together in (1 << 20, 1):
        monkeypatch.setattr("headrace.engine.attention.MAX_SCORES", together)
        with build_engine(path, share=1.0) as engine:
            found.append(greedy_logits(engine, 3))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
