"""Text from files and other machines made safe to print: control and bidirectional characters become escapes."""

import unicodedata

# Characters that change the display order of others.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def printable(text: object, keep: str = "\n") -> str:
    """The text with control characters, bidirectional characters and lone surrogates as escapes like `\\x1b`.

    `keep`: control characters that stay. Names need `keep=""`: a line break in them would make a second line.
    """
    found = str(text)
    if found.isascii() and found.isprintable():
        return found
    return "".join(char if char in keep or not _steers(char) else _escaped(char) for char in found)


def is_utf8(text: str) -> bool:
    """True if the text can be encoded as UTF-8. Lone surrogates, as from arguments in other encodings, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _steers(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in _DIRECTIONS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
