"""Stop strings in streamed text: a possible prefix of one is held back until it is decided.

Text is searched with the spellings of its control tokens, which are never shown. So they can be stop strings or part of
one. Reasoning is searched only for stop strings with control tokens.
"""

from collections.abc import Collection, Sequence

from headrace.model.reasoning import Part, Segment

_MASK = "\ud800"  # stands for reasoning, so that plain stop strings do not match there; no text in UTF-8 holds it


class StopScanner:
    """Takes segments by `push`; returns those that are safe to show, and True once a stop string was found."""

    def __init__(self, stops: Sequence[str], hidden: Collection[str] = ()):
        """`stops` may be empty; `hidden` are the control tokens in them."""
        stops = [stop for stop in stops if stop]
        with_control = [stop for stop in stops if any(token in stop for token in hidden)]
        self._stops = {False: [stop for stop in stops if stop not in with_control], True: with_control}
        self._longest = max(map(len, stops), default=0)
        self._held: list[Segment] = []

    def push(self, segments: Sequence[Segment]) -> tuple[list[Segment], bool]:
        """(segments to show now, True if a stop string was met). The stop string and all after it are never shown."""
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
        """Segments that were held back, when no more text comes."""
        rest, self._held = self._held, []
        return [segment for segment in rest if segment[0] is not Part.HIDDEN]

    def _take(self, count: int) -> list[Segment]:
        """The first `count` characters of the held segments, without those that are never shown."""
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
    """Length of the longest suffix of a text that is a prefix of a stop string."""
    for size in range(min(longest - 1, len(text)), 0, -1):
        end = text[-size:]
        if any(stop.startswith(end) for stop in stops):
            return size
    return 0
