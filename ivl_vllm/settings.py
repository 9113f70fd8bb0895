"""Engine settings: `additional_config["ivl"]`.

This module imports nothing but the standard library: the vLLM frontend reads it in every process.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, NamedTuple

from ivl_vllm.hub import HUB_ID
from ivl_vllm.steering import Steering, finite, parse_steering

_VALUE_FIELDS = ("model", "minus", "vocab_map")
_FIELDS = ("value_model", "values", "default_weight", "max_weight", "skip_unsteered", "trace_file")
# Words of requests that no value may be named by.
_WORDS = ("auto", "max_kl", "trace", "true", "false")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


class NetworkSource(NamedTuple):
    """What one value network is loaded from: folder or hub id, and the map file where its vocabulary is another."""

    model: str
    vocab_map: str | None = None


@dataclass(frozen=True)
class Value:
    """One named value: the logits of `model`, or of `model` minus those of `minus` (expert - anti-expert).

    Both have one vocabulary, which `vocab_map` ties to the base's where it is another.
    """

    model: str
    minus: str | None = None
    vocab_map: str | None = None

    @property
    def signed_networks(self) -> tuple[tuple[NetworkSource, float], ...]:
        """The networks whose logits are added up, each with its sign."""
        expert = (NetworkSource(self.model, self.vocab_map), 1.0)
        return (expert,) if self.minus is None else (expert, (NetworkSource(self.minus, self.vocab_map), -1.0))


@dataclass(frozen=True)
class Settings:
    """Validated engine settings.

    Attributes:
        values: name -> value; the first one is what a plain number in a request means.
        default_weight: weight of the first value in a request that says nothing.
        max_weight: largest absolute weight that a request may ask for.
        skip_unsteered: a value network that no scheduled request uses sits out the step. Requests that use different
            networks then share no blocks of the prefix cache.
        trace_file: where the traces go that requests ask for; None refuses such requests.
    """

    values: dict[str, Value] = field(default_factory=dict)
    default_weight: float = 0.0
    max_weight: float = 10.0
    skip_unsteered: bool = True
    trace_file: str | None = None

    @functools.cached_property
    def networks(self) -> tuple[NetworkSource, ...]:
        """The distinct networks behind all values, in the order in which they are loaded and numbered."""
        return tuple(dict.fromkeys(source for value in self.values.values() for source, _ in value.signed_networks))

    def network_weights(self, weights: Mapping[str, float]) -> list[float]:
        """The weight of every network's logits, from the weights of the named values.

        `w * (model - minus)` is `+w` for `model` and `-w` for `minus`; a network behind several values gets the sum.
        """
        by_network = dict.fromkeys(self.networks, 0.0)
        for name, weight in weights.items():
            for source, sign in self.values[name].signed_networks:
                by_network[source] += sign * weight
        return list(by_network.values())

    def networks_of(self, names: Iterable[str]) -> frozenset[int]:
        """The numbers of the networks behind the named values."""
        used = {source for name in names for source, _ in self.values[name].signed_networks}
        return frozenset(number for number, source in enumerate(self.networks) if source in used)

    def steering(self, extra_args: Mapping[str, Any] | None) -> Steering:
        """What a request asks for.

        Args:
            extra_args: `SamplingParams.extra_args` (over HTTP: `vllm_xargs`).

        Raises:
            ValueError: see `parse_steering`.
        """
        return parse_steering(self, extra_args)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON; `parse_settings` reads it back."""
        return asdict(self)


def _setting_number(number: Any, setting: str) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f"ivl: {setting} is {number!r}: use a number such as 1.0")
    return finite(number, setting)


def parse_settings(config: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Reads and checks `additional_config["ivl"]`, filled up from `IVL_VALUE_MODEL` and `IVL_DEFAULT_WEIGHT`.

    Raises:
        ValueError: names the field, the value that was given and the fix.
    """
    config = dict(config or {}) if isinstance(config, Mapping | None) else config
    if not isinstance(config, dict):
        raise ValueError(
            f'ivl: additional_config["ivl"] is {config!r}: use an object such as {{"value_model": "FOLDER"}}'
        )
    _refuse_unknown(config, _FIELDS, 'additional_config["ivl"]')
    if config.get("value_model") is not None and config.get("values"):
        raise ValueError(
            f"ivl: value_model={config['value_model']!r} and values={config['values']!r} are both set: "
            "value_model is short for one entry of values, keep one of the two"
        )
    values = config.get("values")
    if values is None:
        model = config.get("value_model") or environ.get("IVL_VALUE_MODEL")
        if not model:
            raise ValueError(
                "ivl: the logits processor `ivl` is on but there is no value network: set value_model, for example "
                '--additional-config \'{"ivl": {"value_model": "FOLDER"}}\', or the variable IVL_VALUE_MODEL'
            )
        where = "value_model" if config.get("value_model") else "IVL_VALUE_MODEL"
        values = {"default": {"model": model}}
    else:
        where = "values"
        if not isinstance(values, Mapping) or not values:
            raise ValueError(f'ivl: values is {values!r}: use an object such as {{"math": {{"model": "FOLDER"}}}}')
    parsed = {name: _parse_value(name, spec, where) for name, spec in values.items()}

    max_weight = _setting_number(config.get("max_weight", Settings.max_weight), "max_weight")
    if max_weight <= 0:
        raise ValueError(f"ivl: max_weight is {max_weight:g}: use a number above 0")
    default_weight = _default_weight(config, environ)
    if abs(default_weight) > max_weight:
        raise ValueError(
            f"ivl: default_weight is {default_weight:g}, beyond max_weight={max_weight:g}: lower it or raise max_weight"
        )
    skip_unsteered = config.get("skip_unsteered", Settings.skip_unsteered)
    if not isinstance(skip_unsteered, bool):
        raise ValueError(f"ivl: skip_unsteered is {skip_unsteered!r}: use true or false")
    return Settings(parsed, default_weight, max_weight, skip_unsteered, _trace_file(config.get("trace_file")))


def _trace_file(path: Any) -> str | None:
    if path is None:
        return None
    if not isinstance(path, str) or not path or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"ivl: trace_file is {path!r}: give the path of a file in a folder that exists")
    if os.path.isdir(path):
        raise ValueError(f"ivl: trace_file is {path!r}, which is a folder: give the path of a file in it")
    return os.path.abspath(path)


def _default_weight(config: Mapping[str, Any], environ: Mapping[str, str]) -> float:
    if "default_weight" in config:
        return _setting_number(config["default_weight"], "default_weight")
    text = environ.get("IVL_DEFAULT_WEIGHT")
    if not text:
        return Settings.default_weight
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"ivl: IVL_DEFAULT_WEIGHT is {text!r}: use a number such as 1.0") from None
    return finite(number, "IVL_DEFAULT_WEIGHT")


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"ivl: unknown field {name!r} = {given[name]!r} in {where}: use one of {', '.join(known)}")


def _parse_value(name: Any, spec: Any, where: str) -> Value:
    setting = where if where != "values" else f"values[{name!r}]"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"ivl: {name!r} is no name for a value: use letters, digits, '_', '.', '-', a letter first")
    if name in _WORDS:
        raise ValueError(f"ivl: a value cannot be named {name!r}, which means something else in requests: rename it")
    if not isinstance(spec, Mapping):
        raise ValueError(f'ivl: {setting} is {spec!r}: use an object such as {{"model": "FOLDER"}}')
    _refuse_unknown(spec, _VALUE_FIELDS, setting)
    if not spec.get("model"):
        raise ValueError(f"ivl: {setting} has no model: give a folder or hub id as model")
    for key in _VALUE_FIELDS:
        path = spec.get(key)
        if path is None:
            continue
        if not isinstance(path, str) or not path:
            raise ValueError(f"ivl: {key} of {setting} is {path!r}: use a path as a string")
        if key != "vocab_map" and not os.path.isdir(path) and not HUB_ID.fullmatch(path):
            shown = setting if where != "values" and key == "model" else f"{key} of {setting}"
            raise ValueError(
                f"ivl: {shown} is {path!r}: there is no such folder; give a folder with config.json or a hub id"
            )
    vocab_map = spec.get("vocab_map")
    if vocab_map is not None and not os.path.isfile(vocab_map):
        raise ValueError(
            f"ivl: vocab_map of {setting} is {vocab_map!r}: there is no such file; "
            "make one with: ivl map-vocab --base BASE --value VALUE --output FILE"
        )
    model, minus = (_one_spelling(spec.get(key)) for key in ("model", "minus"))
    return Value(model, minus, None if vocab_map is None else os.path.realpath(vocab_map))


def _one_spelling(model: str | None) -> str | None:
    """Where a folder is, however that was written: what several values name is loaded and run once. Hub ids stay."""
    return os.path.realpath(model) if model is not None and os.path.isdir(model) else model


def engine_args(
    value_model: str | None = None,
    *,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    default_weight: float | None = None,
    max_weight: float | None = None,
    skip_unsteered: bool | None = None,
    trace_file: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` (or `EngineArgs`) that put value networks beside the base model.

    `LLM(BASE, **ivl_vllm.engine_args(value_model=VALUE, default_weight=0.0))`

    Args:
        value_model: folder or hub id of one value network.
        values: name -> `{"model": ..., "minus": ..., "vocab_map": ...}`, instead of `value_model`.
        default_weight: weight of a request that says nothing; 0.0 unless given.
        max_weight: largest accepted absolute weight; 10.0 unless given.
        skip_unsteered: whether value networks sit out the steps in which no request uses them; True unless given.
        trace_file: file for the traces that requests ask for; without it they may not ask.

    Raises:
        ValueError: names the field, the value that was given and the fix.
    """
    given = {
        "value_model": value_model,
        "values": values,
        "default_weight": default_weight,
        "max_weight": max_weight,
        "skip_unsteered": skip_unsteered,
        "trace_file": trace_file,
    }
    config = {name: value for name, value in given.items() if value is not None}
    parse_settings(config)
    return {"logits_processors": ["ivl"], "additional_config": {"ivl": config}}
