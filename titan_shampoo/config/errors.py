"""What a person's mistake looks like: one line that says where, which key, and what to write."""

import difflib
import re
from collections.abc import Iterable

BREAKING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that end a line, steer a terminal or have no place in UTF-8."""

_LONGEST = 1000


class ConfigError(Exception):
    """A mistake in the TOML file, on the command line or in their combination, in one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """``text`` as one line of bearable length, whatever the names and values in it hold."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"
    return BREAKING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The half sentence that names the valid name nearest to ``name``; empty if none is near."""
    by_lowercase = {candidate.lower(): candidate for candidate in valid}
    found = difflib.get_close_matches(name.lower(), by_lowercase, n=1, cutoff=0.6)
    return f'; did you mean "{by_lowercase[found[0]]}"?' if found else ""
