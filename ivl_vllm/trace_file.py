"""Reading a trace: the JSON lines that `ivl_vllm/serving/trace.py` wrote, as tokens in order."""

from __future__ import annotations

import json
import reprlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


class Token(NamedTuple):
    """One generated token.

    Attributes:
        token: its id.
        base_token: id of the token that the base would have liked best.
        kl: nats between the steered distribution and the base's.
        weights: name of the value -> weight.
    """

    token: int
    base_token: int
    kl: float
    weights: dict[str, float]


class _Line(NamedTuple):
    """What a line of the file says of its position; its fields are described in `ivl_vllm/serving/trace.py`."""

    token: int
    base_token: int
    token_before: int | None
    draft: bool
    kl: float
    weights: dict[str, float]


def read_trace(path: str) -> dict[str, list[Token]]:
    """Name of the trace -> its tokens in order; requests that share a name get a number behind it.

    A position that was computed more than once counts as it was the last time. The token at a position is what the line
    of the next one says came before it. In the last step nobody says so: the likeliest after steering is taken there,
    and drafts that are something else end the trace. Blank lines count as none; a last line that was cut off while it
    was written is left out, which is told on stderr.

    Raises:
        ValueError: no such file, or a line that is none of a trace.
    """
    traces: dict[tuple[str, str], dict[int, _Line]] = {}
    try:
        with Path(path).open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    fields = _fields(text)
                except ValueError as error:
                    is_cut = not text.endswith(b"\n") and text.startswith(b"{") and error.__cause__ is not None
                    if not is_cut:
                        raise ValueError(f"{path}, line {number}: no line of a trace ({error})") from error
                    told = f"warning: {path}, line {number}, the last one, is cut off ({error}): it is left out"
                    print(told, file=sys.stderr, flush=True)
                    continue
                line = _Line(*(fields[key] for key in _Line._fields))
                traces.setdefault((fields["trace"], fields["request"]), {})[fields["position"]] = line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): give the engine's trace_file") from error
    found: dict[str, list[Token]] = {}
    alike, seen = Counter(name for name, _ in traces), Counter()
    for (name, _), lines in traces.items():
        seen[name] += 1
        if alike[name] > 1:
            name = f"{name} {seen[name]}"
        found[name] = []
        last = max((position for position, line in lines.items() if not line.draft), default=0)
        for position in sorted(lines):
            line, following = lines[position], lines.get(position + 1)
            before = None if following is None else following.token_before
            actual = before if position < last and before is not None else line.token
            found[name].append(Token(actual, line.base_token, line.kl, line.weights))
            if position >= last and before != actual:
                break
    return found


def _fields(text: bytes) -> dict[str, Any]:
    """The fields of one line, checked.

    Raises:
        ValueError: what is wrong with it; with a cause if it is no JSON at all.
    """
    try:
        fields = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError("no JSON object of plain fields: too deeply nested") from None
    if not isinstance(fields, dict):
        raise ValueError(f"no JSON object, but {reprlib.repr(fields)}")
    for key, (is_right, kind) in _KINDS.items():
        if key not in fields:
            raise ValueError(f"it has no {key!r}")
        if not is_right(fields[key]):
            raise ValueError(f"{key!r} is {reprlib.repr(fields[key])}: expected {kind}")
    return fields


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


_KINDS = {
    **dict.fromkeys(("trace", "request"), (_is_text, "text")),
    **dict.fromkeys(("position", "token", "base_token"), (_is_whole, "a whole number from 0 to 2^31 - 1")),
    "token_before": (lambda value: value is None or _is_whole(value), "a whole number from 0 to 2^31 - 1, or null"),
    "draft": (lambda value: isinstance(value, bool), "true or false"),
    "kl": (_is_number, "a number"),
    "weights": (
        lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(_is_number, value.values())),
        "an object of names and numbers",
    ),
}
