"""The discussion's statements, each as a small file that runs."""

from headrace.claims.claim import Claim, Evaluation, all_claims, evaluate, find_claim

__all__ = ["Claim", "Evaluation", "all_claims", "evaluate", "find_claim"]
