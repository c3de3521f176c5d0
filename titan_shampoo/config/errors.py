"""What a person's mistake looks like: one line that says where, which key, and what to write."""

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """A mistake in the TOML file, on the command line or in their combination, in one line."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The half sentence that names the valid name nearest to ``name``; empty if none is near."""
    by_lowercase = {candidate.lower(): candidate for candidate in valid}
    found = difflib.get_close_matches(name.lower(), by_lowercase, n=1, cutoff=0.6)
    return f'; did you mean "{by_lowercase[found[0]]}"?' if found else ""
