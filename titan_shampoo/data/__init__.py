"""Data sets with an index, and loaders whose position is one integer."""

__all__ = ["DataError"]


class DataError(Exception):
    """Data that a person asked for and that cannot be used: one line, with the key to change."""
