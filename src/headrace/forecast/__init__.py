"""Predicted cost of any model on any machine: seconds, bytes, joules, money. Pure arithmetic on facts with sources; no torch."""
