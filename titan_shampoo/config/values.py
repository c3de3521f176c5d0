"""Whether a value has the type that an annotation asks for: ``int``, ``list[float]``, ...

TOML tells integers from strings and booleans, so nothing is guessed: ``true`` is not 1, ``"10"`` is
not 10. Only an integer is taken where a number is wanted.
"""

import json
import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
}

_WORDS: dict[Any, dict[str, bool | None]] = {
    bool: {"true": True, "false": False},
    NoneType: {"none": None},
}


class WrongTypeError(ValueError):
    """The value does not have the annotated type."""


def accept(value: Any, annotation: Any) -> Any:  # noqa: ANN401  (values and types of any kind)
    """``value`` as the annotation has it: an integer becomes a float where a float is wanted.

    Raises:
        WrongTypeError: If the value has another type, is not one of the choices, or is NaN.
    """
    if get_origin(annotation) in (Union, UnionType):
        return _accept_any(value, get_args(annotation))
    if get_origin(annotation) is list and isinstance(value, list):
        (inner,) = get_args(annotation)
        return [accept(item, inner) for item in value]
    if annotation is float and type(value) in (int, float) and value == value:
        return _as_float(value)
    if get_origin(annotation) is Literal and value in get_args(annotation):
        return value
    if annotation in (bool, int, str, NoneType) and type(value) is annotation:
        return value
    raise WrongTypeError


def _as_float(value: float) -> float:
    """``value``, infinite if no float is as large."""
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _accept_any(value: Any, annotations: tuple[Any, ...]) -> Any:  # noqa: ANN401
    for annotation in annotations:
        try:
            return accept(value, annotation)
        except WrongTypeError:
            continue
    raise WrongTypeError


def from_text(text: str, annotation: Any) -> Any:  # noqa: ANN401
    """What a command-line argument means for a type; the text itself where it means nothing.

    Lists are written ``64,32`` or, as in TOML, ``[64, 32]``; "none" unsets what may be unset, but
    for keys of which it is a choice.
    """
    if text in choices(annotation):
        return text
    if get_origin(annotation) in (Union, UnionType):
        return _first_fit(text, get_args(annotation))
    if get_origin(annotation) is list:
        (inner,) = get_args(annotation)
        items = _toml_value(text)
        return items if items is not text else [from_text(item, inner) for item in text.split(",")]
    if annotation in (int, float):
        return _number(text, annotation)
    words = _WORDS.get(annotation, {})
    return words.get(text.lower(), text)


def _first_fit(text: str, annotations: tuple[Any, ...]) -> Any:  # noqa: ANN401
    for annotation in sorted(annotations, key=lambda member: member is not NoneType):
        value = from_text(text, annotation)
        try:
            accept(value, annotation)
        except WrongTypeError:
            continue
        return value
    return text


def whole_number(text: str) -> int | None:
    """The number that up to 18 digits are, None for any other text."""
    is_one = text.isascii() and text.isdecimal() and len(text) <= 18
    return int(text) if is_one else None


def _number(text: str, kind: type[int] | type[float]) -> int | float | str:
    try:
        return kind(text)
    except ValueError:
        return text


def _toml_value(text: str) -> Any:  # noqa: ANN401
    """The value of a bracketed TOML array; the text itself if it is none."""
    if not text.startswith("["):
        return text
    import tomli  # noqa: PLC0415  (of the extra: without it the package imports, too)

    try:
        return tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, thousands of digits or brackets
        return text


def describe(annotation: Any) -> str:  # noqa: ANN401
    """The type in words, as in "an integer or a list (each item an integer)"."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(annotation))
    if get_origin(annotation) is list:
        (inner,) = get_args(annotation)
        return f"a list (each item {describe(inner)})"
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        return " or ".join(dict.fromkeys(describe(member) for member in members))
    return _NAMES[annotation]


def choices(annotation: Any) -> list[str]:  # noqa: ANN401
    """The values that a ``Literal``, alone or in a union, allows; empty for other types."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return [choice for member in get_args(annotation) for choice in choices(member)]
    return []


def show(value: Any) -> str:  # noqa: ANN401
    """A value as TOML writes it, on one line and not too long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # Python does not write integers of more than 4300 digits
        text = hex(value) if isinstance(value, int) else "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
