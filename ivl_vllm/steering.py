"""What a request asks for in `extra_args["ivl"]` (over HTTP: `vllm_xargs`), read against the engine's settings.

This module imports nothing but the standard library: the vLLM frontend reads it in every process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivl_vllm.settings import Settings

_AUTO = "auto"
_OPTIONS = ("max_kl", "trace")
_TRACE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_EXAMPLES = (
    'send a number (1.0), true or false without quotes, or a string like "math=1.0,code=0.5", "auto" or '
    '"1.0;max_kl=2.0"'
)


@dataclass(frozen=True)
class Steering:
    """A request's wish.

    Attributes:
        weights: name of a value -> weight, without those that are 0.
        auto: names of the pairs whose weights Dynamic Logits Fusion finds at every token; `weights` is empty then.
        max_kl: nats by which a token's distribution may move away from the base's; `weights` are scaled down to it.
        trace: name under which the engine writes down how far each token was steered.
    """

    weights: dict[str, float] = field(default_factory=dict)
    auto: tuple[str, ...] = ()
    max_kl: float | None = None
    trace: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The values that take part."""
        return (*self.weights, *self.auto)


def parse_steering(settings: Settings, extra_args: Mapping[str, Any] | None) -> Steering:
    """Reads a request's `extra_args`.

    Raises:
        ValueError: anything but a number, a boolean, `{"name": number}`, a number as a string, `"name=number,..."`,
            `"auto"`, `"auto:name,other"`, such a string with `;max_kl=number` or `;trace=name` behind it; an unknown
            name; a weight that is not finite or beyond `max_weight`; a trace where the engine has no `trace_file`.
    """
    if "ivl" not in (extra_args or {}):
        return Steering(_checked(settings, {_first(settings): settings.default_weight}))
    asked = extra_args["ivl"]
    if not isinstance(asked, str):
        return Steering(_checked(settings, asked if isinstance(asked, Mapping) else {_first(settings): asked}))
    body, *rest = (part.strip() for part in asked.split(";"))
    options = _options(rest, asked)
    max_kl, trace = _max_kl(options.get("max_kl"), asked), _trace(settings, options.get("trace"))
    if body.partition(":")[0].strip() == _AUTO:
        if max_kl is not None:
            raise ValueError(f"ivl: {asked!r} has a max_kl, but auto finds its own weight: ask for one of the two")
        return Steering(auto=_auto_names(settings, body, asked), trace=trace)
    number = _number(body)
    weights = _checked(settings, _pairs(settings, body, asked) if number is None else {_first(settings): number})
    return Steering(weights, max_kl=max_kl if weights else None, trace=trace)  # nothing is found for no weights


def plain(asked: Any) -> Any:
    """The same wish in Python's own types, which vLLM can send to its engine: NumPy's numbers and strings it cannot.

    What is of these types already is given back as it is.
    """
    if type(asked) in (bool, int, float, str):
        return asked
    if isinstance(asked, Mapping):
        found = {str(name): plain(given) for name, given in asked.items()}
        is_plain = type(asked) is dict and all(type(n) is str and found[n] is given for n, given in asked.items())
        return asked if is_plain else found
    return str(asked) if isinstance(asked, str) else float(asked)


def _first(settings: Settings) -> str:
    return next(iter(settings.values))


def _checked(settings: Settings, asked: Mapping[Any, Any]) -> dict[str, float]:
    weights = {}
    for name, given in asked.items():
        _known(settings, name)
        if not isinstance(given, Real):
            kind = type(given).__name__
            raise ValueError(f"ivl: weight {given!r} of {name!r} is a {kind}, not a number: {_EXAMPLES}")
        weight = finite(given, f"weight of {name!r}")
        if abs(weight) > settings.max_weight:
            raise ValueError(
                f"ivl: weight {weight:g} of {name!r} is beyond max_weight={settings.max_weight:g}: "
                'ask for less, or start the engine with a larger max_weight in additional_config["ivl"]'
            )
        if weight:
            weights[name] = weight
    return weights


def _known(settings: Settings, name: Any) -> None:
    if name in _OPTIONS and name not in settings.values:
        raise ValueError(f'ivl: {name} stands in a string, behind the weights, as in "1.0;max_kl=2.0" or "1.0;trace=a"')
    if name not in settings.values:
        raise ValueError(f"ivl: unknown value {name!r}: this engine has {', '.join(settings.values)}")


def _auto_names(settings: Settings, body: str, asked: str) -> tuple[str, ...]:
    """`"auto"` -> the first value; `"auto:math,code"` -> both, all of them pairs."""
    _, colon, rest = body.partition(":")
    names = tuple(name.strip() for name in rest.split(",")) if colon else (_first(settings),)
    for name in names:
        _known(settings, name)
        if settings.values[name].minus is None:
            raise ValueError(
                f"ivl: {asked!r} compares an expert with its small base, but {name!r} has no minus model: "
                'give values[NAME] a "minus", or limit a plain value network with "1.0;max_kl=2.0"'
            )
    if len(set(names)) < len(names):
        raise ValueError(f"ivl: {asked!r} names a value twice: name each value once")
    # In one order, whatever the request's: they are solved together with those of other requests.
    return tuple(name for name in settings.values if name in names)


def _options(parts: list[str], asked: str) -> dict[str, str]:
    """`["max_kl=2.0", "trace=a"]` -> `{"max_kl": "2.0", "trace": "a"}`."""
    options: dict[str, str] = {}
    for part in parts:
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in _OPTIONS or name in options:
            raise ValueError(
                f'ivl: {asked!r}: a ";" is followed by max_kl=NATS or trace=NAME, each once, as in "1.0;max_kl=2.0"'
            )
        options[name] = text
    return options


def _max_kl(text: str | None, asked: str) -> float | None:
    if text is None:
        return None
    number = _number(text)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f'ivl: {asked!r}: max_kl must be a positive number of nats, as in "1.0;max_kl=2.0"')
    return number


def _trace(settings: Settings, name: str | None) -> str | None:
    if name is None:
        return None
    if settings.trace_file is None:
        raise ValueError(
            f"ivl: trace={name!r}, but this engine writes no traces: "
            'start it with trace_file in additional_config["ivl"]'
        )
    if not _TRACE_NAME.fullmatch(name):
        raise ValueError(f"ivl: trace={name!r} is no name: use up to 64 letters, digits, '_', '.', '-'")
    return name


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _pairs(settings: Settings, text: str, asked: str) -> dict[str, float]:
    """`"math=1.0,code=-0.5"` -> `{"math": 1.0, "code": -0.5}`."""
    pairs: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        weight = _number(number)
        if not equals or weight is None:
            what = "" if part == asked else f" of {asked!r}"
            if part.strip() in settings.values:
                raise ValueError(f"ivl: {part.strip()!r}{what} has no weight: write {part.strip()}=1.0")
            if _number(part) is not None:
                raise ValueError(f"ivl: {part.strip()!r}{what} has no name: among several write NAME={part.strip()}")
            raise ValueError(f"ivl: {part.strip()!r}{what} is not a weight: {_EXAMPLES}")
        if name in pairs:
            raise ValueError(f"ivl: {name!r} is given twice in {asked!r}: name each value once")
        pairs[name] = weight
    return pairs


def finite(number: Real, what: str) -> float:
    """The number as a float.

    Raises:
        ValueError: it is NaN or infinite, or too large for a float.
    """
    try:
        result = float(number)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"ivl: {what} is {number}: use a finite number")
    return result
