"""Draft tokens that a test knows, and a machine on which verifying them costs nothing."""

from headrace.engine.drafters import MAX_BUCKET, ConfidenceBucket, DraftToken, ModelDrafter
from headrace.plan.cost import PassCost
from support.zoo.gguf_files import VOCAB


def free_rows(rows: int) -> PassCost:
    """A disk-bound machine: a pass takes a second for any number of rows."""
    return PassCost(disk_s=1.0, compute_s=0.001 * rows)


class Oracle(ModelDrafter):
    """Proposes the given tokens, wrong ones at some positions, so that every kind of partial acceptance happens."""

    def __init__(self, tokens: list[int], wrong_every: int):
        self.source = "oracle"
        self._tokens = tokens
        self._wrong_every = wrong_every

    def propose(self, drafts):  # type: ignore[no-untyped-def]
        for draft in drafts:
            at = len(draft.tokens) + len(draft.draft_tokens)
            if at < len(self._tokens):
                token = self._tokens[at]
                wrong = at % self._wrong_every == 0
                draft.draft_tokens.append(
                    DraftToken((token + 1) % VOCAB if wrong else token, ConfidenceBucket(self.source, MAX_BUCKET))
                )
        return 9 * len(drafts)  # rows: `Speculation` does not take its time for that of a draft token

    def forget(self, sequence_id) -> None:  # type: ignore[no-untyped-def]
        pass
