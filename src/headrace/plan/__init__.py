"""What it will cost: how much memory there is, what is pinned, what a pass takes. Pure arithmetic, no torch."""

from headrace.plan.memory import Budget, budget_of, detect_budget, given_budget
from headrace.plan.plan import Plan, Range, Request, make_plan
from headrace.plan.profile import Profile, guessed_profile, load_profile

__all__ = [
    "Budget",
    "Plan",
    "Profile",
    "Range",
    "Request",
    "budget_of",
    "detect_budget",
    "given_budget",
    "guessed_profile",
    "load_profile",
    "make_plan",
]
