"""The engine: sequences with their KV caches, one step over all their new rows, sampling, and the trace."""

from headrace.engine.attention import KVCache
from headrace.engine.engine import Engine, Rows
from headrace.engine.timeline import PassStats, Trace

__all__ = ["Engine", "KVCache", "PassStats", "Rows", "Trace"]
