"""Predicted cost of a run: available memory, pinned weights, seconds per pass. Pure arithmetic, no torch."""

from headrace.plan.budget import Budget, budget_of, detect_budget, given_budget
from headrace.plan.choices import choose_drafting, choose_sequences, make_plan
from headrace.plan.draft import NO_DRAFT, Drafting, drafting_options
from headrace.plan.plan import Plan, Range
from headrace.plan.profile import Profile, guessed_profile, load_profile
from headrace.plan.run_config import RunConfig

__all__ = [
    "NO_DRAFT",
    "Budget",
    "Drafting",
    "Plan",
    "Profile",
    "Range",
    "RunConfig",
    "budget_of",
    "choose_drafting",
    "choose_sequences",
    "detect_budget",
    "drafting_options",
    "given_budget",
    "guessed_profile",
    "load_profile",
    "make_plan",
]
