"""Data sets with an index, and loaders whose position is one integer."""

__all__ = ["DataError", "UnreadableSampleError", "printable"]


def printable(text: object) -> str:
    """``text`` on one line that every stream can encode: newlines and lone surrogates escaped.

    Names of files hold both: Python decodes bytes that are not UTF-8 to lone surrogates.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class DataError(Exception):
    """Requested data that cannot be used: one line, with the key to change."""

    def __str__(self) -> str:
        """The message, printable."""
        return printable(super().__str__())


class UnreadableSampleError(Exception):
    """One broken sample: its place and its defect, in one line."""

    def __str__(self) -> str:
        """The message, printable."""
        return printable(super().__str__())
