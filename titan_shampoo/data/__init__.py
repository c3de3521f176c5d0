"""Data sets with an index, and loaders whose position is one integer."""

__all__ = ["DataError", "UnreadableSampleError"]


class DataError(Exception):
    """Data that a person asked for and that cannot be used: one line, with the key to change."""


class UnreadableSampleError(Exception):
    """One sample that is broken: where it is and what is wrong with it, in one line."""
