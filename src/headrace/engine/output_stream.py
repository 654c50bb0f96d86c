"""The outputs of some requests, for one thread that reads them one by one."""

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from headrace.engine.engine_thread import EngineThread
from headrace.engine.request import Event, Progress, Request, RequestError, RequestOutput
from headrace.errors import UsageError


class OutputStream(Generator[RequestOutput]):
    """Takes requests, a few at a time, and yields their outputs. When it is closed or dropped, its requests end.

    A second thread that reads it at the same time gets a `UsageError`.
    """

    def __init__(
        self,
        thread: EngineThread,
        requests: Iterator[Request],
        max_requests: int,
        on_progress: Callable[[Progress], None] | None,
        on_error: Callable[[int, BaseException], bool] = lambda *_: False,
    ):
        """Take nothing yet.

        Args:
            thread: runs the requests.
            requests: taken as others end.
            max_requests: max requests in flight.
            on_progress: called with the progress of prompts.
            on_error: called with the number of a request that failed, and its error; False: the stream raises it.
        """
        self._on_error = on_error
        self._thread = thread
        self._process = os.getpid()
        self._outputs = self._run(requests, max_requests, on_progress)

    def send(self, value: None) -> RequestOutput:
        """The next output."""
        try:
            return self._outputs.send(value)
        except ValueError as error:
            if "already executing" not in str(error):
                raise
            raise UsageError(
                "another thread is reading this stream", hint="read a stream in one thread at a time"
            ) from error

    def throw(self, *given: Any) -> RequestOutput:
        """Throw into the generator."""
        return self._outputs.throw(*given)

    def close(self) -> None:
        """End the stream."""
        self._outputs.close()

    def _run(
        self, requests: Iterator[Request], max_requests: int, on_progress: Callable[[Progress], None] | None
    ) -> Generator[RequestOutput]:
        events: SimpleQueue[Event] = SimpleQueue()
        index_of: dict[int, int] = {}  # number of the request by its id
        taken = 0
        exhausted = False
        try:
            while True:
                added = 0
                while not exhausted and len(index_of) < max_requests:
                    request = next(requests, None)
                    if request is None:
                        exhausted = True
                        break
                    number = self._thread.new_id()
                    index_of[number], taken = taken, taken + 1
                    self._thread.add_request(
                        number, request, events.put, wants_progress=on_progress is not None, wakes=False
                    )
                    added += 1
                    if added == max_requests // 2:
                        self._thread.wake()
                if added:
                    self._thread.wake()  # all of them start with the same pass
                if not index_of:
                    return
                event = self._next(events)
                if isinstance(event, RequestError):
                    if not self._on_error(index_of[event.request_id], event.error):
                        raise event.error
                    del index_of[event.request_id]
                    continue
                if isinstance(event, Progress):
                    if on_progress is not None:
                        on_progress(event)
                    continue
                index = index_of[event.request_id]
                if event.finish_reason is not None:
                    del index_of[event.request_id]
                yield replace(event, index=index)
        finally:
            for number in index_of:
                self._thread.abort(number)

    def _next(self, events: "SimpleQueue[Event]") -> Event:
        if os.getpid() != self._process:
            raise UsageError("a stream does not go on in a forked process", hint="load the model in the child")
        event = events.get()
        if self._thread.is_closed and not isinstance(event, RequestError):
            raise UsageError("the model was closed while it answered", hint="close it when the stream has ended")
        return event
