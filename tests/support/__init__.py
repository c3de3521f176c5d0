"""Helpers that several test modules share; `tests/reference` has the algorithms written naively."""
