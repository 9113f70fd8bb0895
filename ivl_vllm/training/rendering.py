"""What a chat template makes of demonstrations: answers that it drops are refused, prompts that it changes are told."""

import json
import os
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ivl_vllm.training.data import Example
from ivl_vllm.training.progress import long_bar

# What a chat template may raise: its own refusal, or Python's word on a message of another kind than it expects.
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


def check_rendered(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, flag: str) -> list[str]:
    """Render every conversation as it is trained, and look whether its answer is there.

    Args:
        examples: As `data.read_examples` gives them; plain text is not looked at.
        tokenizer: With the chat template.
        flag: The flag that they came from.

    Returns:
        Warnings, a line each: reasoning that is left out, prompts that are rendered otherwise than when asked, and
        settings that the template does not know.

    Raises:
        ValueError: The template does not take a conversation, or leaves out an answer's text or tool calls; with the
            line.
    """
    if not examples or examples[0]["plain"]:
        return []
    unreasoned, beside, changed, unread = [], [], [], {}
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)  # or several, by name
    for example in long_bar(examples, f"rendering {flag}", "examples"):
        where, answer = f"{flag}, line {example['line']}", example["completion"][0]
        options = {"tools": json.loads(example["tools"]) if example["tools"] else None}
        options |= {"tokenize": False, **example["chat_template_kwargs"]}
        try:
            asked = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template([*example["prompt"], answer], **options)
        except _REFUSALS as error:
            raise ValueError(f"{where}: the chat template does not take this conversation: {error}") from error
        trained = _after(asked, whole, answer["content"].strip())
        for name in example["chat_template_kwargs"]:
            if name not in template:
                unread.setdefault(name, []).append(example["line"])
        if not whole.startswith(asked):
            changed.append(example["line"])
        reasoning, _, content = answer["content"].rpartition("</think>")
        for name in filter(None, map(_called, answer.get("tool_calls", ()))):
            if name not in trained:
                raise ValueError(
                    f"{where}: the chat template leaves out the tool call {name!r}, so that an answer without it would "
                    "be trained: give another with --chat_template_path, or leave the line out"
                )
        if _is_lost(content, trained):
            if not answer.get("tool_calls"):
                raise ValueError(
                    f"{where}: the chat template leaves out the answer's text, so that an empty answer would be "
                    "trained: give another with --chat_template_path"
                )
            beside.append(example["line"])
        if _is_lost(answer.get("reasoning_content") or reasoning.replace("<think>", ""), trained):
            unreasoned.append(example["line"])
    told = (
        (unreasoned, "the chat template leaves out the reasoning"),
        (beside, "the chat template leaves out the text beside a tool call"),
        (changed, "the chat template renders the prompt otherwise before an answer than where it asks for one"),
        *((lines, f"the chat template has no {name!r}, of `chat_template_kwargs`") for name, lines in unread.items()),
    )
    return [
        f"warning: {flag}: {what}: {len(lines)} of {len(examples)} answers, the first in line {lines[0]}"
        for lines, what in told
        if lines
    ]


def _after(asked: str, whole: str, answer: str) -> str:
    """What follows the prompt: from where both differ, or from the answer's start if they differ in the midst of it."""
    start = len(os.path.commonprefix([asked, whole]))  # noqa: RUF071  (it is meant for texts too)
    if start < len(asked):
        inside = (size for size in range(min(start, len(answer)), 0, -1) if whole[:start].endswith(answer[:size]))
        start -= next(inside, 0)
    return whole[start:]


def _is_lost(text: Any, rendered: str) -> bool:
    """Whether neither end of a text is there; in between templates may trim and indent."""
    words = text.split() if isinstance(text, str) else []
    return bool(words) and words[0] not in rendered and words[-1] not in rendered


def _called(call: dict[str, Any]) -> Any:
    return call.get("function", call).get("name")
