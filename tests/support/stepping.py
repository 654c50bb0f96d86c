"""A scheduler and a runner whose steps a test makes one by one, without requests and text."""

from collections.abc import Sequence
from typing import Any

from headrace.engine import Engine
from headrace.engine.runner import ModelRunner
from headrace.engine.sampler import Sampler
from headrace.engine.scheduler import ScheduledStep, Scheduler, SequenceState
from headrace.engine.timeline import PassStats


class Stepper:
    """Sequences of token ids, without text."""

    def __init__(
        self, engine: Engine, num_slots: int, capacity: int, prefill_rows: int, speculation: Any = None, **options: Any
    ):
        returns_memory = options.get("kv_tokens") is not None
        self.runner = ModelRunner(engine, num_slots, capacity, returns_memory=returns_memory)
        self.scheduler = Scheduler(self.runner.info, prefill_rows, **options)
        self.scheduler.speculation = speculation
        self.steps: list[ScheduledStep] = []
        self.drafted = self.accepted = 0

    def add(self, prompt: Sequence[int], max_tokens: int, sampler: Sampler) -> SequenceState:
        return self.scheduler.add(prompt, max_tokens, sampler)

    def remove(self, sequence: SequenceState) -> None:
        self.scheduler.remove(sequence)

    def step(self) -> list[SequenceState]:
        """Run one pass; the sequences that got tokens."""
        scheduled = self.scheduler.schedule()
        assert scheduled is not None
        self.steps.append(scheduled)
        is_first_pass = not self.runner.engine.passes
        output = self.runner.execute(scheduled.step)
        results = self.scheduler.update(scheduled, output)
        for result in results:
            if result.error is not None:
                raise result.error
        new = [result for result in results if result.tokens]
        self.drafted += sum(result.drafted for result in new)
        self.accepted += sum(len(result.tokens) - 1 for result in new)
        if isinstance(output.stats, PassStats) and not is_first_pass:
            self.scheduler.record(scheduled, output.stats, sum(len(result.tokens) for result in new))
        return [result.sequence for result in new]

    def finish(self, sequences: Sequence[SequenceState]) -> None:
        """Step until these have all their tokens, and remove each when it has."""
        left = list(sequences)
        while left:
            self.step()
            for sequence in [one for one in left if one.generated == one.max_tokens]:
                self.remove(sequence)
                left.remove(sequence)
