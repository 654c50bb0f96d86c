"""The owner thread of an engine: it runs passes while there are requests, and hands their events out.

Callers take no lock: Ctrl-C may interrupt them at any point. They append to queues that the owner reads between passes.
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from headrace.engine.llm_engine import LLMEngine
from headrace.engine.request import Event, Progress, Request, RequestError
from headrace.errors import UsageError

# Receives the events of one request, on the owner thread: it must not wait.
Sink = Callable[[Event], None]


class EngineThread:
    """Requests from any thread, answered by one owner thread, which ends with `close`."""

    def __init__(self, engine: LLMEngine):
        """Start the thread. From now on only this may call `engine.step`."""
        self._engine = engine
        engine.on_progress = self._on_progress
        self._sinks: dict[int, Sink] = {}
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._closing = self._ended = False
        self._process = os.getpid()
        # A daemon: a program that forgets to close its model still ends.
        self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """True after `close` was called."""
        return self._closing

    @property
    def is_current(self) -> bool:
        """True if the caller runs on the owner thread."""
        return self._thread is threading.current_thread()

    def new_id(self) -> int:
        """An id for a request, known before it is added: so it can be aborted whatever interrupts its caller."""
        return self._engine.new_id()

    def add_request(
        self, request_id: int, request: Request, sink: Sink, *, wants_progress: bool = False, wakes: bool = True
    ) -> None:
        """Queue a request; `sink` gets its events. With `wakes=False` an idle owner starts it with the next one, or `wake`.

        Raises:
            UsageError: the model is closed, the process was forked, or the request is not for this model.
            ContextError: the prompt fills the context.
        """
        if os.getpid() != self._process:
            raise UsageError(
                "this model was loaded before the process forked", hint="load it in the child, started with `spawn`"
            )
        if self._closing:
            raise _closed()
        self._sinks[request_id] = sink  # first: the owner may run it at once
        try:
            self._engine.add_request(request, request_id, wants_progress=wants_progress)
        except BaseException:
            self._sinks.pop(request_id, None)
            raise
        if wakes:
            self.wake()
        if self._ended and self._sinks.pop(request_id, None) is not None:
            raise _closed()

    def wake(self) -> None:
        """Let the owner look for new requests."""
        self._wake.put(None)

    def abort(self, request_id: int) -> None:
        """End a request; its sink gets no further events, but for those under way. Safe for requests that have ended."""
        if os.getpid() == self._process:
            self._engine.abort(request_id)  # first, whatever interrupts the rest
            self._sinks.pop(request_id, None)
            self._wake.put(None)

    def close(self) -> None:
        """End all requests with an error, after the pass in progress. Safe to call twice, from any thread."""
        self._closing = True
        self._wake.put(None)
        if not self.is_current:
            self._thread.join()

    def _run(self) -> None:
        failure: BaseException = UsageError(
            "the model was closed while it answered", hint="close it when its streams have ended"
        )
        try:
            while not self._closing:
                if not self._engine.has_work:
                    self._wake.get()
                    continue
                for event in self._engine.step():
                    self._hand_out(event)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._closing = self._ended = True
            for event in self._engine.fail_all(failure):
                self._hand_out(event)

    def _hand_out(self, event: Event) -> None:
        assert not isinstance(event, Progress)
        ends = isinstance(event, RequestError) or event.finish_reason is not None
        sink = self._sinks.pop(event.request_id, None) if ends else self._sinks.get(event.request_id)
        if sink is not None:
            self._give(event.request_id, sink, event)

    def _give(self, request_id: int, sink: Sink, event: Event) -> None:
        """Call a sink. If it raises, its request ends, and no other one is disturbed."""
        try:
            sink(event)
        except Exception:
            self._sinks.pop(request_id, None)
            self._engine.abort(request_id)

    def _on_progress(self, request_id: int, progress: Progress) -> None:
        sink = self._sinks.get(request_id)
        if sink is not None:
            self._give(request_id, sink, progress)


def _closed() -> UsageError:
    return UsageError("the model is closed", hint="load it again")
