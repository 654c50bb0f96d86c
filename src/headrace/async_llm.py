"""A loaded model for asyncio programs. Any number of tasks may ask it; their prompts share the passes.

async with await AsyncLLM.load("model.gguf", memory="4GiB", sequences=8) as llm:
    async for output in llm.stream("Count to ten."):
        print(output.text, end="")
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from headrace.api import Model, load
from headrace.completion import Completion
from headrace.engine.request import Event, Request, RequestError, RequestOutput
from headrace.model.tokenizer import Prompt
from headrace.sampling_params import SamplingParams


class AsyncLLM:
    """Streams and answers without blocking the event loop. An asynchronous context manager."""

    def __init__(self, model: Model):
        """`model` may be asked by threads as well; this closes it."""
        self.model = model

    @classmethod
    async def load(cls, path: str, **options: Any) -> "AsyncLLM":
        """Load a model in a thread; arguments and errors as in `headrace.load`."""
        loading = asyncio.ensure_future(asyncio.to_thread(load, path, **options))
        try:
            return cls(await asyncio.shield(loading))
        except asyncio.CancelledError:
            loading.add_done_callback(_close)  # the thread cannot be stopped
            raise

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all requests with an error, and free all memory."""
        await asyncio.to_thread(self.model.close)

    async def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
    ) -> AsyncGenerator[RequestOutput]:
        """The outputs of one prompt, as they are computed; arguments and errors as in `Model.stream`.

        A stream that is closed, or whose task is cancelled, ends its request.
        """
        request = await asyncio.to_thread(
            self.model.request, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw
        )
        async with aclosing(self.stream_request(request)) as outputs:
            async for output in outputs:
                yield output

    async def stream_request(self, request: Request) -> AsyncGenerator[RequestOutput]:
        """The outputs of a request, as they are computed."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def sink(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed, and nobody waits
                self.model.abort(number)

        number = self.model.add_request(request, sink)
        try:
            while True:
                event = await events.get()
                if isinstance(event, RequestError):
                    raise event.error
                assert isinstance(event, RequestOutput)
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.model.abort(number)

    async def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
    ) -> Completion:
        """The whole answer to one prompt; arguments and errors as in `stream`."""
        outputs = self.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw)
        async with aclosing(outputs):
            return self.model.completion([output async for output in outputs])


def _close(loading: "asyncio.Future[Model]") -> None:
    """Close a model that nobody waits for."""
    if not loading.cancelled() and loading.exception() is None:
        threading.Thread(target=loading.result().close, name="headrace-close").start()
