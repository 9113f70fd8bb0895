"""The words of `ivl train`, and a YAML file of the same names, become settings."""

import argparse
import difflib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from trl import TrlParser

from ivl_vllm.training.arguments import ValueArguments
from ivl_vllm.training.trainer import TrainerArguments

_HELP = "(see: ivl train --help)"


class _Parser(TrlParser):
    """TRL's parser, which also takes aliases (`output`, `lr`, …) in the YAML file and raises instead of exiting."""

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        actions = {
            option.lstrip("-").replace("-", "_"): action
            for action in self._actions
            for option in action.option_strings
            if not option.startswith(("--no_", "--no-"))
        }
        names = {name: action.dest for name, action in actions.items()}
        for key in kwargs:
            if key.replace("-", "_") not in names:
                nearest = _nearest(key.replace("-", "_"), names)
                raise ValueError(f"--config {self.config}: unknown setting {key!r}{nearest} {_HELP}")
        given = {actions[key.replace("-", "_")]: value for key, value in kwargs.items()}
        return super().set_defaults_with_config(**{action.dest: _as_meant(v, action) for action, v in given.items()})

    # The file that --config names, for messages.
    config = ""

    def check_flags(self, words: Sequence[str]) -> None:
        """Refuse the first flag that there is not; argparse would first miss the required one that was meant.

        Raises:
            ValueError: It names the flag and the nearest that there is.
        """
        options = [option for action in self._actions for option in action.option_strings]
        for word in words:
            flag = word.split("=", 1)[0]
            if flag == "--config" or not flag.startswith("-") or _is_number(flag):
                continue
            # argparse takes the beginning of a name for the whole of it.
            if not any(option.startswith(flag) for option in options):
                raise ValueError(f"unknown flag {flag}{_nearest(flag, options)} {_HELP}")

    def error(self, message: str) -> None:
        raise ValueError(f"{message} {_HELP}")


def _as_meant(value: Any, action: argparse.Action) -> Any:
    """YAML reads `no` as false, and nobody writes a list around one word."""
    if value is False and action.dest.endswith("_strategy"):
        return "no"
    if value is False and action.dest == "report_to":
        return "none"
    if isinstance(value, str) and action.nargs in ("+", "*"):
        return [value]
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def parse(argv: Sequence[str]) -> tuple[ValueArguments, TrainerArguments]:
    """Read flags, and a YAML file of the same names where `--config FILE` is among them; flags win.

    Raises:
        ValueError: An unknown or missing setting, or a value out of range.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    parser = _Parser((ValueArguments, TrainerArguments), prog="ivl train")
    parser.check_flags(words)
    if "--config" in words:
        place = words.index("--config") + 1
        words[place : place + 1] = map(os.path.expanduser, words[place : place + 1])
        parser.config = _check_config(words[place:])
    try:
        value_args, args, surplus = parser.parse_args_and_config(words, return_remaining_strings=True)
    except json.JSONDecodeError as error:  # transformers reads flags that begin with a brace
        before, found, _ = " ".join(words).partition(error.doc)
        flag = before.rstrip(" =").rpartition(" ")[2] if found else f"--config {parser.config}:"
        raise ValueError(f"{flag} {error.doc}: no JSON ({error.msg} at column {error.colno})") from error
    except OSError as error:
        raise ValueError(f"{error}; a flag names that file, give one that can be read") from error
    if surplus:
        raise ValueError(f"nothing takes the word {surplus[0]!r}; a flag has one value, but for --more_bases {_HELP}")
    _check_trackers(args.report_to)
    return value_args, args


def _check_config(rest: Sequence[str]) -> str:
    """Refuse a YAML file that cannot be read; `rest` begins with its path, which is returned."""
    fix = "give the path of a YAML file with one `name: value` a line"
    if not rest or rest[0].startswith("--"):
        raise ValueError(f"--config has no value; {fix}")
    path = rest[0]
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; {fix}, or leave --config out") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"--config {path}: its content is no mapping of names to values; {fix}")
    return path


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed; the trainer would after everything is loaded, at length."""
    from transformers.integrations import integration_utils

    available = integration_utils.get_available_reporting_integrations()
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise ValueError(
                f"--report_to {name}: no such tracker{_nearest(name, known)}; expected none, all, or one of "
                f"{', '.join(known)}"
            )
        # Of these two transformers does not always tell that they are there.
        if name not in available and name not in ("flyte", "azure_ml"):
            package = "'ivl-vllm[train]'" if name == "tensorboard" else name.replace("_", "-")
            raise ValueError(
                f"--report_to {name}: its package is missing; pip install {package}, or leave the flag out"
            )
