"""Stop strings in streamed text: a possible prefix of one is held back until it is decided.

Text is looked at with the spellings of control tokens in it, which are never shown: so they can be stop strings, or part of
one. In what a model thinks, only stop strings with control tokens are looked for.
"""

from collections.abc import Collection, Sequence

from headrace.model.reasoning import Part, Segment

_MASK = "\ud800"  # stands for reasoning, so that plain stop strings do not match there; no text in UTF-8 holds it


class StopScanner:
    """Give it segments with `push`; it returns what is safe to show, and whether a stop string was found."""

    def __init__(self, stops: Sequence[str], hidden: Collection[str] = ()):
        """`stops` may be empty; `hidden` are the control tokens in them."""
        stops = [stop for stop in stops if stop]
        with_control = [stop for stop in stops if any(token in stop for token in hidden)]
        self._stops = {False: [stop for stop in stops if stop not in with_control], True: with_control}
        self._longest = max(map(len, stops), default=0)
        self._held: list[Segment] = []

    def push(self, segments: Sequence[Segment]) -> tuple[list[Segment], bool]:
        """(what to show now, whether a stop string was met); the stop string and all after it are never shown."""
        self._held += segments
        if not self._longest:
            return self.rest(), False
        texts = {
            False: "".join(_MASK * len(text) if part is Part.REASONING else text for part, text in self._held),
            True: "".join(text for _, text in self._held),
        }
        found = [text.find(stop) for control, text in texts.items() for stop in self._stops[control] if stop in text]
        if found:
            shown = self._take(min(found))
            self._held.clear()
            return shown, True
        undecided = max(_undecided(text, self._stops[control], self._longest) for control, text in texts.items())
        return self._take(len(texts[True]) - undecided), False

    def rest(self) -> list[Segment]:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, []
        return [segment for segment in rest if segment[0] is not Part.HIDDEN]

    def _take(self, count: int) -> list[Segment]:
        """The first `count` characters of what is held, without those that are never shown."""
        shown: list[Segment] = []
        while self._held and count:
            part, text = self._held[0]
            if part is not Part.HIDDEN:
                shown.append((part, text[:count]))
            if len(text) > count:
                self._held[0] = part, text[count:]
                break
            del self._held[0]
            count -= len(text)
        return shown


def _undecided(text: str, stops: Sequence[str], longest: int) -> int:
    """The length of the longest end of a text that begins a stop string."""
    for size in range(min(longest - 1, len(text)), 0, -1):
        end = text[-size:]
        if any(stop.startswith(end) for stop in stops):
            return size
    return 0
