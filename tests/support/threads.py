"""Calls in other threads, and points at which they wait."""

import threading
from collections.abc import Callable
from typing import Any

HANG_TIMEOUT_S = 30.0  # wait of a test before a call counts as hanging


class Task(threading.Thread):
    """A call in a separate thread, and its outcome."""

    def __init__(self, call: Callable[[], Any]):
        super().__init__(daemon=True)
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def outcome(self) -> Any:
        """The result or the exception of the call."""
        self.join(HANG_TIMEOUT_S)
        assert not self.is_alive(), "the call hangs"
        return self.result if self.error is None else self.error


class Pause:
    """Blocks its n-th caller until it is released."""

    def __init__(self, at: int = 1):
        self._left = at
        self._reached, self._released = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self._left -= 1
        if self._left == 0:
            self._reached.set()
            assert self._released.wait(HANG_TIMEOUT_S)

    def reached(self) -> None:
        assert self._reached.wait(HANG_TIMEOUT_S)

    def release(self) -> None:
        self._released.set()
