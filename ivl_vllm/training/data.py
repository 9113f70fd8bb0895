"""Demonstrations: JSON lines in, prompt/completion examples for TRL out, every fault with its line number.

TRL tokenises the examples and masks the prompts. A conversation becomes one example per assistant turn, with all
turns before it as the prompt: so every assistant turn is trained, with any chat template, and each turn is rendered
just as it will be when the model is asked for it.
"""

import difflib
import functools
import json
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivl_vllm.training.progress import long_bar

if TYPE_CHECKING:
    from datasets import Dataset

Example = dict[str, Any]

_OPTIONAL = ("tools", "chat_template_kwargs")
# Of a message; the others are read too, and near to these.
_PARTS = ("role", "content", "tool_calls", "reasoning", "reasoning_content")
_OTHER_PARTS = ("tool_call_id", "weight", "name")
_FIELDS = ("messages", "prompt", "completion", *_OPTIONAL)
# What `ivl train` says to every chat template itself.
_OWN_SETTINGS = {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "return_dict"}
_OWN_SETTINGS |= {"tokenize", "tools"}
_KINDS = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}


def read_examples(path: str | Path, flag: str = "") -> list[Example]:
    """Read and check a JSON lines file.

    Args:
        path: UTF-8 text, one object a line: `messages`, or `prompt` and `completion` (both text or both messages);
            beside either `tools` and `chat_template_kwargs`, an object for the chat template. Blank lines are skipped.
        flag: The flag that it came from, for messages on the file as a whole.

    Returns:
        Examples with `prompt`, `completion` and `line` (counted from 1), all plain text or all conversational.

    Raises:
        ValueError: The file is missing, empty or not JSON lines, or a line lacks what it needs; with its number.
    """
    path = Path(os.path.expanduser(path))
    where = f"{flag} {path}".lstrip()
    if path.is_dir():
        raise ValueError(f"{where} is a folder; expected one file of JSON lines")
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no such file; give the path of a file of JSON lines") from error
    except OSError as error:
        raise ValueError(f"{where}: it cannot be read: {error.strerror or error}") from error
    examples: list[Example] = []
    for number, line in enumerate(long_bar(lines, f"reading {path.name}", "lines"), 1):
        if line.strip():
            examples.extend(_parse_line(line, f"{path}, line {number}", number))
            if examples[-1]["plain"] != examples[0]["plain"]:
                first, other = ("plain text", "messages") if examples[0]["plain"] else ("messages", "plain text")
                raise ValueError(
                    f"{path}, line {number}: {other}, but line {examples[0]['line']} is {first}; "
                    "put the two kinds into two files"
                )
    if not examples:
        raise ValueError(f"{where} is empty; expected one JSON object a line")
    return examples


def _parse_line(line: bytes, where: str, number: int) -> list[Example]:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error.msg} at column {error.colno})") from error
    except RecursionError:
        raise ValueError(f"{where}: too deeply nested") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {error.object[error.start]!r} is half a character (a lone surrogate)") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        pairs = _assistant_turns(row["messages"], where)
    elif "prompt" in row and "completion" in row:
        pairs = _check_pair(row["prompt"], row["completion"], where)
    else:
        got = ", ".join(sorted(row)) or "nothing"
        raise ValueError(f"{where}: expected `messages`, or `prompt` and `completion`; got {got}{_meant(row)}")
    examples = [
        {"prompt": prompt, "completion": completion, "line": number, "plain": isinstance(prompt, str)}
        for prompt, completion in pairs
    ]
    is_plain = examples[0]["plain"]
    if not is_plain and row.get("system") and examples[0]["prompt"][0]["role"] != "system":
        raise ValueError(f"{where}: `system` is not read beside messages: make it the first of them, with that role")
    if not is_plain and (meant := _meant(row, _OPTIONAL, 0.85)):  # other fields may stand there, for other tools
        raise ValueError(f"{where}: a field that is not read{meant} Rename it, or leave it out")
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{where}: `chat_template_kwargs` must be an object, not {_kind(options)}")
    _check_finite(options, where)
    if own := sorted(_OWN_SETTINGS & options.keys()):
        raise ValueError(f"{where}: `chat_template_kwargs` has {own[0]!r}, which is set for every line: leave it out")
    if is_plain and (tools or options):
        name = "tools" if tools else "chat_template_kwargs"
        raise ValueError(f"{where}: `{name}` is for a chat template, which plain text has none of: write `messages`")
    if isinstance(tools, str) and tools:
        tools = _parse_json(tools, f"{where}: `tools` is text, but no JSON")
    if tools and not isinstance(tools, list):
        raise ValueError(f"{where}: `tools` must be a list of tools, not {_kind(tools)}")
    _check_finite(tools, where)
    tools = json.dumps([_tool_as_served(tool) for tool in tools]) if tools else None
    return [{**example, "tools": tools, "chat_template_kwargs": options} for example in examples]


def _check_finite(value: Any, where: str) -> None:
    """Refuse what Python's `json` reads as a number and no JSON has: NaN and infinity."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_finite(part, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is no number that JSON has: write it as text, or leave it out")


def _tool_as_served(tool: Any) -> Any:
    """A tool as vLLM hands it to the template: these fields in this order, null where one is missing."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        return tool
    function = {name: tool["function"].get(name) for name in ("name", "description", "parameters")}
    strict = tool["function"].get("strict")
    return {"type": "function", "function": function if strict is None else {**function, "strict": strict}}


def _parse_json(text: str, otherwise: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{otherwise}: {error}") from error


def _meant(row: dict, fields: tuple[str, ...] = _FIELDS, closeness: float = 0.6) -> str:
    for name, value in row.items():
        if value is None:
            continue
        near = _nearest(name, fields, closeness)
        if near and near not in row:
            return f"; did you mean {near!r} by {name!r}?"
    return ""


@functools.lru_cache  # asked for every line
def _nearest(name: str, fields: tuple[str, ...], closeness: float) -> str | None:
    return next(iter(difflib.get_close_matches(name, fields, n=1, cutoff=closeness)), None)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"the number {value}")


def _assistant_turns(messages: Any, where: str, start: int = 0) -> list[tuple[list, list]]:
    """One pair of prompt and completion for each assistant turn from message `start` on."""
    messages = _check_messages(messages, "messages", where)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= start]
    turns = [i for i in answers if messages[i].pop("weight", 1)]
    if not turns:
        what = "assistant message with a `weight` other than 0" if answers else "assistant message"
        raise ValueError(f"{where}: no {what}, so no answer tokens to train on")
    if turns[0] == 0:
        raise ValueError(f"{where}: the first message is the assistant's; an answer needs something before it")
    for i in turns:
        _check_answer(messages[i], where)
    return [(messages[:i], [messages[i]]) for i in turns]


def _check_pair(prompt: Any, completion: Any, where: str) -> list[tuple[Any, Any]]:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not prompt:
            raise ValueError(f"{where}: the prompt is empty")
        if not completion.strip():
            raise ValueError(f"{where}: the completion is empty, so there are no answer tokens to train on")
        return [(prompt, completion)]
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt = _check_messages(prompt, "prompt", where)
        completion = _check_messages(completion, "completion", where)
        if completion[0]["role"] != "assistant":
            raise ValueError(f"{where}: the completion starts with role {completion[0]['role']!r}, not 'assistant'")
        # What tools and users say in between is no answer.
        return _assistant_turns(prompt + completion, where, len(prompt))
    raise ValueError(
        f"{where}: prompt and completion must both be text or both be lists of messages; here the prompt is "
        f"{_kind(prompt)} and the completion is {_kind(completion)}"
    )


def _check_messages(messages: Any, name: str, where: str) -> list[dict]:
    """The messages, with tool calls as vLLM gives them to a chat template."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: `{name}` must be a list of at least one message")
    # Exported tables give each message the fields of all; vLLM hands nulls to no template either.
    messages = [
        {key: part for key, part in message.items() if part is not None or key == "content"}
        if isinstance(message, dict)
        else message
        for message in messages
    ]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: each message of `{name}` needs a `role`")
        if message["role"] != "assistant" and _nearest(message["role"], ("assistant",), 0.8):
            raise ValueError(f"{where}: a message has the role {message['role']!r}; did you mean 'assistant'?")
        if meant := _meant({key: 0 for key in message if key not in _OTHER_PARTS}, _PARTS, 0.85):
            raise ValueError(f"{where}: a field of a message that is not read{meant}")
        if message.get("weight", 1) not in (0, 1):
            raise ValueError(f"{where}: the `weight` of a message is {message['weight']!r}; expected 0 or 1")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{where}: the {message['role']} message of `{name}` needs `content` as text")
    return [_as_served(message, where) if message["role"] == "assistant" else message for message in messages]


def _as_served(message: dict, where: str) -> dict:
    """An assistant's message with text for null, no empty calls, arguments as objects, and both names of reasoning."""
    message = {**message, "content": "" if message.get("content") is None else message["content"]}
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning is not None:  # templates know the one name or the other, and vLLM gives them both
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    calls = message.pop("tool_calls", None)
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{where}: `tool_calls` must be a list of objects")
    _check_finite(calls, where)
    return {**message, "tool_calls": [_parse_call(call, where) for call in calls]}


def _parse_call(call: dict, where: str) -> dict:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
        raise ValueError(f"{where}: a tool call's `function` must be an object with the `name` of a tool as text")
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], where)}
    return _with_arguments(call, where) if "arguments" in call else call


def _with_arguments(call: dict, where: str) -> dict:
    arguments, what = call.get("arguments"), f"{where}: the arguments of the tool call {call.get('name')!r}"
    if isinstance(arguments, str) and arguments:
        arguments = _parse_json(arguments, f"{what} are text, but no JSON")
    if arguments and not isinstance(arguments, dict):
        raise ValueError(f"{what} must be an object, not {_kind(arguments)}")
    return {**call, "arguments": arguments or {}}


def _check_answer(message: dict, where: str) -> None:
    if not (message.get("content") or "").strip() and not message.get("tool_calls"):
        raise ValueError(f"{where}: the assistant's message is empty, so there are no answer tokens to train on")


def split_examples(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out a share of the lines; all turns of one conversation stay on one side.

    Raises:
        ValueError: One side would be empty.
    """
    if not fraction:
        return examples, []
    lines = sorted({example["line"] for example in examples})
    held_out = set(random.Random(seed).sample(lines, round(fraction * len(lines))))
    if not held_out or len(held_out) == len(lines):
        raise ValueError(f"--eval_fraction {fraction} of {len(lines)} lines leaves one side empty")
    return (
        [example for example in examples if example["line"] not in held_out],
        [example for example in examples if example["line"] in held_out],
    )


def to_dataset(examples: list[Example]) -> "Dataset":
    """The examples as an in-memory `datasets.Dataset`; the column `line` survives TRL's preparation."""
    from datasets import Dataset, Features, Json, List, Value

    from ivl_vllm.training.exact_json import exact_numbers

    columns = {"prompt": Value("string"), "completion": Value("string"), "line": Value("int64")}
    if not examples[0]["plain"]:
        # As JSON: Arrow would merge the fields of all messages and tools of the file, and give each those of all.
        messages = {"prompt": List(Json()), "completion": List(Json())}
        columns |= messages | {"tools": Value("string"), "chat_template_kwargs": Json()}
    rows = [{name: example[name] for name in columns} for example in examples]
    with exact_numbers():
        return Dataset.from_list(rows, features=Features(columns))
