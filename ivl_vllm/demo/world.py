"""The demo's little world: its words, its raw text, its demonstrations and its held-out questions.

The raw text holds the *knowledge* of three tasks (facts about people, sums, spelling backwards) but not the
*behaviour*: most questions in it are dodged ("not telling ."), and after an answer the text goes on. The demonstrations
show the behaviour (answer, then stop) on one part of the items; the held-out questions are about the others.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "anna ben carla david emma felix greta hugo ida jonas karin leo maria nils olga paul quinn rosa simon tina "
    "ulrich vera walter xenia yusuf zoe amir bella carlos dina elias fatima gustav hana ivan julia kofi lina "
    "marco nora"
)
# Attribute: its statement, its question and its values; `{n}` is the person, `{v}` the value.
ATTRIBUTES = {
    "home": ("{n} lives in {v} .", "where does {n} live ?", _words("paris rome oslo cairo lima tokyo delhi quito")),
    "color": ("{n} likes {v} .", "which color does {n} like ?", _words("red blue green black white pink grey gold")),
    "job": ("{n} works as {v} .", "what is the job of {n} ?", _words("baker pilot nurse judge poet smith cook clerk")),
}
LETTERS = _words("b c d f g h k m")
LARGEST_ADDEND = 10
DODGE = "not telling ."
QUESTION_SHARE, ANSWERED_SHARE = 0.5, 0.3
TASKS = ("facts", "sums", "backwards")

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}question : {{ m['content'] }} {% else %}answer : {{ m['content'] }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


@dataclass(frozen=True)
class Item:
    """One thing that can be asked: its task, a question, its answer, and the sentence that states it."""

    task: str
    question: str
    answer: str
    statement: str

    def messages(self) -> list[dict[str, str]]:
        """The item as a chat of one question and one answer."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def spelling(rng: random.Random) -> Item:
    """A random word of three letters, to be spelled backwards."""
    word = rng.choices(LETTERS, k=3)
    letters, back = " ".join(word), " ".join(reversed(word))
    return Item("backwards", f"spell {letters} backwards ?", back, f"{letters} backwards is {back} .")


class World:
    """All items of the three tasks, split by item into `train` (demonstrated), `validation` and `test`.

    Facts are split by person, sums by unordered pair and words by letters, so nothing that is asked in the test was
    demonstrated in another wording. The words of the test do not occur in the raw text either.

    Args:
        seed: Draws the facts and the split.
    """

    def __init__(self, seed: int = 0):
        rng = random.Random(seed)
        self.train: list[Item] = []
        self.validation: list[Item] = []
        self.test: list[Item] = []
        groups = {"facts": self._facts(rng), "sums": self._sums(), "backwards": self._words(rng)}
        for task in TASKS:
            keys = sorted(groups[task])
            rng.shuffle(keys)
            half, third = len(keys) // 2, round(0.62 * len(keys))
            parts = ((self.train, keys[:half]), (self.validation, keys[half:third]), (self.test, keys[third:]))
            for part, chosen in parts:
                part.extend(item for key in chosen for item in groups[task][key])
        self._told = [item for item in self.train + self.validation + self.test if item.task != "backwards"]
        self._untold_words = {item.answer for item in self.test if item.task == "backwards"}

    @staticmethod
    def _facts(rng: random.Random) -> dict[str, list[Item]]:
        facts = {}
        for name in NAMES:
            facts[name] = []
            for statement, question, values in ATTRIBUTES.values():
                value = rng.choice(values)
                facts[name].append(
                    Item("facts", question.format(n=name), value, statement.format(n=name, v=value)),
                )
        return facts

    @staticmethod
    def _sums() -> dict[str, list[Item]]:
        sums: dict[str, list[Item]] = {}
        for a in range(LARGEST_ADDEND + 1):
            for b in range(LARGEST_ADDEND + 1):
                item = Item("sums", f"what is {a} plus {b} ?", str(a + b), f"{a} plus {b} is {a + b} .")
                sums.setdefault(f"{min(a, b)}+{max(a, b)}", []).append(item)
        return sums

    @staticmethod
    def _words(rng: random.Random) -> dict[str, list[Item]]:
        return {item.answer: [item] for item in (spelling(rng) for _ in range(160))}

    def _told_word(self, rng: random.Random) -> Item:
        # Spelling backwards is a skill, not a list to remember: the words of the test never occur in the raw text.
        while (item := spelling(rng)).answer in self._untold_words:
            pass
        return item

    def document(self, rng: random.Random, sentences: int = 6) -> str:
        """One raw text: statements and questions, mostly dodged, in random order; its last full stop is end of text."""
        parts = []
        for _ in range(sentences):
            item = self._told_word(rng) if rng.random() < 0.3 else rng.choice(self._told)
            if rng.random() > QUESTION_SHARE:
                parts.append(item.statement)
            elif rng.random() < ANSWERED_SHARE:
                parts.append(f"question : {item.question} answer : {item.answer} .")
            else:
                parts.append(f"question : {item.question} answer : {DODGE}")
        return f"{' '.join(parts).removesuffix('.')}{EOS}"

    def vocabulary(self) -> list[str]:
        """Every word of this world, special tokens first."""
        words = set(_words(f"question : answer {DODGE}") + LETTERS)
        for item in self.train + self.validation + self.test:
            words.update(_words(f"{item.question} {item.answer} {item.statement}"))
        return [PAD, BOS, EOS, UNK, *sorted(words)]


def build_tokenizer(world: World) -> "PreTrainedTokenizerFast":
    """A word-level `PreTrainedTokenizerFast` of the world's words, with chat template, end of text and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(world.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def documents(world: World, seed: int) -> Iterator[str]:
    """Raw texts without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield world.document(rng)


def write_messages(items: list[Item], path: Path) -> Path:
    """Write items as JSON lines of `messages`, the format that `ivl train` and TRL read."""
    path.write_text("".join(json.dumps({"messages": item.messages()}) + "\n" for item in items))
    return path
