"""Claims about running large models, each as a small executable file."""

from headrace.claims.claim import Claim, Evaluation, all_claims, evaluate, find_claim

__all__ = ["Claim", "Evaluation", "all_claims", "evaluate", "find_claim"]
