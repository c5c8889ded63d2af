"""Text of others, made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text with "?" in place of what is not printed, except line breaks.

    Names and errors come from servers. An escape sequence among them would do whatever
    the terminal does for it: clear the screen, set the title, write to the clipboard.
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)
