"""The owner thread of an engine: it runs passes while there are requests, and hands their events out."""

import os
import threading
from collections.abc import Callable

from headrace.engine.llm_engine import LLMEngine
from headrace.engine.request import Event, Progress, Request, RequestError
from headrace.errors import UsageError

# Receives the events of one request, on the owner thread: it must not wait.
Sink = Callable[[Event], None]


class EngineThread:
    """Requests from any thread, answered by one owner thread. It starts with the first request and ends with `close`."""

    def __init__(self, engine: LLMEngine):
        """From now on only this may call `engine.step`."""
        self._engine = engine
        engine.on_progress = self._on_progress
        self._changed = threading.Condition()
        self._sinks: dict[int, Sink] = {}
        self._closing = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def new_id(self) -> int:
        """An id for a request, known before it is added: so it can be aborted whatever interrupts its caller."""
        return self._engine.new_id()

    def add_request(self, request_id: int, request: Request, sink: Sink, *, wants_progress: bool = False) -> None:
        """Queue a request; `sink` gets its events.

        Raises:
            UsageError: the model is closed, the process was forked, or the request is not for this model.
            ContextError: the prompt leaves no position for an answer.
        """
        if os.getpid() != self._process:
            raise UsageError(
                "this model was loaded before the process forked", hint="load it in the child, started with `spawn`"
            )
        with self._changed:
            if self._closing:
                raise UsageError("the model is closed", hint="load it again")
            self._engine.add_request(request, request_id, wants_progress=wants_progress)
            self._sinks[request_id] = sink
            if self._thread is None:
                # A daemon: a program that forgets to close its model still ends.
                self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def abort(self, request_id: int) -> None:
        """End a request; its sink gets no further events, but for those under way. Safe for requests that have ended."""
        if os.getpid() != self._process:
            return
        with self._changed:
            if self._sinks.pop(request_id, None) is not None:
                self._engine.abort(request_id)
                self._changed.notify_all()

    def close(self) -> None:
        """End all requests with an error, after the pass in progress. Safe to call twice, from any thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                for event in self._engine.step():
                    self._hand_out(event)
        finally:
            with self._changed:
                closed = self._closing
                self._closing = True
            error = UsageError("the model was closed while it answered", hint="close it when its streams have ended")
            failure = error if closed else RuntimeError("the engine's thread ended")
            for event in self._engine.fail_all(failure):
                self._hand_out(event)

    def _wait_for_work(self) -> bool:
        """Wait for a request; False: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._engine.has_work)
            return not self._closing

    def _hand_out(self, event: Event) -> None:
        assert not isinstance(event, Progress)
        sink = self._sinks.get(event.request_id)
        if isinstance(event, RequestError) or event.finish_reason is not None:
            self._sinks.pop(event.request_id, None)
        if sink is not None:
            sink(event)

    def _on_progress(self, request_id: int, progress: Progress) -> None:
        sink = self._sinks.get(request_id)
        if sink is not None:
            sink(progress)
