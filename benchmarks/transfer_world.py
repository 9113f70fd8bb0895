"""The little world of the transfer benchmark: raw text, demonstrations, held-out questions, two kinds of tokenizer.

The raw text holds the *knowledge* of four tasks and seldom the *behaviour*: most questions in it are dodged, and after
an answer the text mostly goes on. Demonstrations show the behaviour (answer, then stop) on one part of the items, and
the test asks about others. A fifth group, `news`, is told in the text of the newer release alone and never
demonstrated. `told_verbatim` counts what the raw text gives away.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ivl_vllm.demo.world import ATTRIBUTES, LARGEST_ADDEND, NAMES, Item, spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TASKS = ("facts", "sums", "backwards", "dates")
NEWS = "news"
NEW_NAMES = ["petra", "samir", "lotte", "bruno", "ines", "oscar", "mila", "rafael", "signe", "tomas", "wanda", "viktor"]
MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_PEOPLE = frozenset(NAMES + NEW_NAMES)
DAYS = 28
DODGES = ("not telling .", "who knows ?", "ask me later .")
QUESTION_SHARE, ANSWERED_SHARE = 0.5, 0.3
# How many of the sentences of a raw text are about what.
TEXT_SHARES = {"facts": 0.4, "sums": 0.3, "backwards": 0.15, "dates": 0.15}
TEST_ITEMS = 60
BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"


def prompt(item: Item) -> str:
    """What a model is asked."""
    return f"question : {item.question} answer :"


def date(day: int, month: int) -> Item:
    """A day of the year, to be written in figures."""
    said, written = f"{day} {MONTHS[month - 1]}", f"{day:02d} / {month:02d}"
    return Item("dates", f"how is {said} written ?", written, f"{said} is written {written} .")


def word(rng: random.Random) -> Item:
    """A word to be spelled backwards that is not the same both ways."""
    while (made := spelling(rng)).answer == made.answer[::-1]:
        pass
    return made


def group(item: Item) -> str:
    """What items that are told and learnt together share: a person, an unordered pair of addends or of a word's ends.

    Items of a group are in the same part of the split, and their hits and misses are not independent.
    """
    if item.task in ("facts", NEWS):
        return next(name for name in item.question.split() if name in _PEOPLE)
    if item.task == "sums":
        return "+".join(sorted(item.question.split()[2:5:2]))
    return min(item.answer, item.answer[::-1]) if item.task == "backwards" else item.answer


def facts_about(names: list[str], task: str, rng: random.Random) -> dict[str, list[Item]]:
    """Name → one item for each attribute, with a value drawn."""
    facts: dict[str, list[Item]] = {}
    for name in names:
        for statement, question, values in ATTRIBUTES.values():
            value = rng.choice(values)
            item = Item(task, question.format(n=name), value, statement.format(n=name, v=value))
            facts.setdefault(name, []).append(item)
    return facts


class World:
    """All items, split into `train` (demonstrated), `validation` and `test`; `news` belongs to the newer release.

    The split is by `group`: nothing that is asked in the test was demonstrated in another wording. Words (either way
    round) and dates of the test's part, being skills, are not in the raw text either, whether or not they are asked.

    Args:
        seed: Draws the facts and the split.
        test_items: Most test items of a task; nothing else depends on it.
    """

    def __init__(self, seed: int = 0, test_items: int = TEST_ITEMS):
        rng = random.Random(seed)
        addends = range(LARGEST_ADDEND + 1)
        people = [item for items in facts_about(NAMES, "facts", rng).values() for item in items]
        words = [word(rng) for _ in range(170)]
        dates = [date(*rng.choice([(d, m) for d in range(1, DAYS + 1) for m in range(1, 13)])) for _ in range(200)]
        sums = [
            Item("sums", f"what is {a} plus {b} ?", str(a + b), f"{a} plus {b} is {a + b} .")
            for a in addends
            for b in addends
        ]
        groups: dict[str, dict[str, list[Item]]] = {task: {} for task in TASKS}
        for item in {item.question: item for item in (*people, *sums, *words, *dates)}.values():
            groups[item.task].setdefault(group(item), []).append(item)
        self.train: list[Item] = []
        self.validation: list[Item] = []
        self.test: list[Item] = []
        self._told: dict[str, list[Item]] = {}
        self._untold: set[str] = set()
        for task in TASKS:
            keys = sorted(groups[task])
            rng.shuffle(keys)
            half, limit = len(keys) // 2, round(0.62 * len(keys))
            train, validation, test = (
                [item for key in part for item in groups[task][key]]
                for part in (keys[:half], keys[half:limit], keys[limit:])
            )
            self.train += train
            self.validation += validation
            self.test += test[:test_items]
            self._told[task] = train + validation + test
            if task in ("backwards", "dates"):
                self._untold.update(group(item) for item in test)
        self.news = [item for items in facts_about(NEW_NAMES, NEWS, rng).values() for item in items]

    def _sentence_item(self, rng: random.Random, newer: bool) -> Item:
        (task,) = rng.choices(list(TEXT_SHARES), TEXT_SHARES.values())
        if task == "facts" and newer and rng.random() < 0.5:
            return rng.choice(self.news)
        if task in ("facts", "sums"):
            return rng.choice(self._told[task])
        while True:
            made = word(rng) if task == "backwards" else date(rng.randint(1, DAYS), rng.randint(1, 12))
            if group(made) not in self._untold:
                return made

    def document(self, rng: random.Random, newer: bool = False, sentences: int = 6) -> str:
        """One raw text: statements and questions, mostly dodged; its last full stop is end of text."""
        parts = []
        for _ in range(sentences):
            item = self._sentence_item(rng, newer)
            if rng.random() > QUESTION_SHARE:
                parts.append(item.statement)
            elif rng.random() < ANSWERED_SHARE:
                parts.append(f"{prompt(item)} {item.answer} .")
            else:
                parts.append(f"{prompt(item)} {rng.choice(DODGES)}")
        return f"{' '.join(parts).removesuffix('.').rstrip()}{EOS}"

    def documents(self, seed: int, newer: bool = False) -> Iterator[str]:
        """Raw texts without end, the same for the same seed."""
        rng = random.Random(seed)
        while True:
            yield self.document(rng, newer)


def told_verbatim(items: list[Item], texts: Iterable[str]) -> dict[str, float]:
    """Shares of items that raw texts give away word for word.

    Returns:
        `stated`, `answered` (the question with its answer), and `ended` (that, and the end of text right behind it, as
        a demonstration has it).
    """
    text = EOS.join(texts)
    forms = {
        "stated": [item.statement.removesuffix(" .") for item in items],
        "answered": [f"{prompt(item)} {item.answer} " for item in items],
        "ended": [f"{prompt(item)} {item.answer}{EOS}" for item in items],
    }
    found = {name: [form in text for form in every] for name, every in forms.items()}
    found["answered"] = [a or e for a, e in zip(found["answered"], found["ended"], strict=True)]
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


def write_demonstrations(items: list[Item], path: Path) -> Path:
    """Write items as JSON lines of `prompt` and `completion`, the format that `ivl train` and TRL read."""
    rows = [{"prompt": prompt(item), "completion": f" {item.answer}"} for item in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_tokenizer(world: World, kind: str, seed: int = 0) -> "PreTrainedTokenizerFast":
    """A tokenizer trained on this world's raw text, small enough that many words have several tokens.

    The two kinds cut different words, and some tokens of each have no partner in the other: numbers, for one.

    Args:
        world: Whose text; the news are in it, as byte-level tokenizers spell any name anyway.
        kind: `bpe` (byte-level, as GPT-2's and Llama 3's) or `wordpiece` (`##` within words, as BERT's).
        seed: Of the text.
    """
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, UNK]
    texts = [text.removesuffix(EOS) for text in islice(world.documents(seed + 1000, newer=True), 3000)]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=440, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        raise ValueError(f"kind is {kind!r}; expected bpe or wordpiece")
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
