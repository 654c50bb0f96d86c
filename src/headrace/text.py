"""Text from files and other machines made safe to print: control and bidirectional characters become escapes."""

import unicodedata

# Signs that change the order in which others are shown.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def printable(text: object, keep: str = "\n") -> str:
    """The text with control characters, signs of direction and halves of characters as escapes such as `\\x1b`.

    `keep`: control characters that stay. Of a name, give none: a line break in it would make a second line.
    """
    found = str(text)
    if found.isascii() and found.isprintable():
        return found
    return "".join(char if char in keep or not _steers(char) else _escaped(char) for char in found)


def is_utf8(text: str) -> bool:
    """Whether it can be written as UTF-8: half a character, as bytes of other encodings become in arguments, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _steers(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in _DIRECTIONS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
