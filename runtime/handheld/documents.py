"""JSON from anybody: bounded, without duplicate keys, and always an object."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from handheld.errors import HandheldError


def parse_object(
    data: bytes,
    limit: int,
    path: str | Path,
    error: type[HandheldError],
    remedy: str | None = None,
) -> dict[str, Any]:
    """Parse the text of a JSON object.

    Parameters
    ----------
    data : bytes
        UTF-8.
    limit : int
        Most bytes that are looked at.
    path : path-like
        Named in errors.
    error : type
        What is raised.

    Raises
    ------
    HandheldError
        Of the class ``error``: for text over the limit, broken or deeply nested JSON, a key
        that occurs twice in one object, NaN and infinity, and anything that is no object.
    """
    if len(data) > limit:
        raise error(f"{len(data)} bytes is over the limit", path=path, remedy=remedy)
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise error("the JSON is nested too deeply", path=path, remedy=remedy) from None
    except ValueError as e:
        raise error(f"broken JSON: {e}", path=path, remedy=remedy) from None
    if not isinstance(tree, dict):
        raise error("is not a JSON object", path=path, remedy=remedy)
    return tree


def json_bytes(tree: Any) -> bytes:
    """Return JSON values as the bytes of a file: the same values, the same bytes."""
    return (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        name = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"the key '{name}' occurs twice in one object")
    return tree


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
