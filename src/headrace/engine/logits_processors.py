"""Logits processors: functions of (token ids, logits) that return changed logits.

Token ids are those of the whole sequence before the token to draw, prompt included. A processor is a pure function of them, so
that drafts, verification and replay of a sequence give the same tokens.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from headrace.sampling_params import SamplingParams

LogitsProcessor: TypeAlias = Callable[[Sequence[int], torch.Tensor], torch.Tensor]


def make_processors(params: SamplingParams, prompt_tokens: int) -> tuple[LogitsProcessor, ...]:
    """The processors that the parameters ask for, in vLLM's order: bias, then penalties.

    Args:
        params: sampling parameters of the request.
        prompt_tokens: length of the prompt; presence and frequency count only the tokens behind it.
    """
    processors: list[LogitsProcessor] = []
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias))
        values = torch.tensor(list(params.logit_bias.values()))

        def bias(_: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            return logits.index_add(0, tokens, values)

        processors.append(bias)
    if params.repetition_penalty != 1:

        def repetition(token_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            seen = torch.tensor(list(set(token_ids)))
            values = logits[seen]
            penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            return logits.index_copy(0, seen, penalised)

        processors.append(repetition)
    if params.presence_penalty or params.frequency_penalty:

        def presence_and_frequency(token_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            counts = Counter(token_ids[prompt_tokens:])
            penalties = [-params.presence_penalty - params.frequency_penalty * count for count in counts.values()]
            return logits.index_add(
                0, torch.tensor(list(counts), dtype=torch.long), torch.tensor(penalties, dtype=torch.float32)
            )

        processors.append(presence_and_frequency)
    return tuple(processors)
