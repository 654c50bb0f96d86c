"""The one comparison of logits: the largest divergence of a row, and whether the likeliest tokens are the same."""

import torch


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest KL divergence of a row, from theirs to ours."""
    return float(divergences(ours, theirs).max())


def divergences(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL divergence of each row, from theirs to ours: (rows,)."""
    found = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none")
    return found.sum(-1)


def same_argmax(ours: torch.Tensor, theirs: torch.Tensor, tie: float = 1e-3) -> bool:
    """True if our likeliest token is theirs in every row, but for ties within `tie` of a logit."""
    chosen = theirs.gather(-1, ours.argmax(-1, keepdim=True))[:, 0]
    return bool((theirs.max(-1).values - chosen < tie).all())
