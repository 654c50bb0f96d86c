"""The terminal: the only package that prints. stdout is data, stderr is everything else."""

from headrace.cli.app import main

__all__ = ["main"]
