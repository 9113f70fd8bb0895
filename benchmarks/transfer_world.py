"""The little world of the transfer benchmark: raw text, demonstrations, held-out questions, two kinds of tokenizer.

The raw text holds the *knowledge* of four tasks but not the *behaviour*: most questions in it are dodged, and after an
answer the text goes on. Demonstrations show the behaviour (answer, then stop) on one part of the items, and the test
asks about others. A fifth group, `news`, is told in the text of the newer release alone and never demonstrated.
"""

import json
import random
from collections.abc import Iterator
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

    Facts are split by person, sums by unordered pair, words and dates one by one: nothing that is asked in the test
    was demonstrated in another wording. Words and dates of the test, being skills, are not in the raw text either.

    Args:
        seed: Draws the facts and the split.
        test_items: Most test items of a task.
    """

    def __init__(self, seed: int = 0, test_items: int = TEST_ITEMS):
        rng = random.Random(seed)
        sums: dict[str, list[Item]] = {}
        for a in range(LARGEST_ADDEND + 1):
            for b in range(LARGEST_ADDEND + 1):
                item = Item("sums", f"what is {a} plus {b} ?", str(a + b), f"{a} plus {b} is {a + b} .")
                sums.setdefault(f"{min(a, b)}+{max(a, b)}", []).append(item)
        dates = [date(*rng.choice([(d, m) for d in range(1, DAYS + 1) for m in range(1, 13)])) for _ in range(200)]
        groups = {
            "facts": facts_about(NAMES, "facts", rng),
            "sums": sums,
            "backwards": {item.answer: [item] for item in (spelling(rng) for _ in range(170))},
            "dates": {item.answer: [item] for item in dates},
        }
        self.train: list[Item] = []
        self.validation: list[Item] = []
        self.test: list[Item] = []
        self._told: dict[str, list[Item]] = {}
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
        self.news = [item for items in facts_about(NEW_NAMES, NEWS, rng).values() for item in items]
        self._untold = {item.answer for item in self.test if item.task in ("backwards", "dates")}

    def _sentence_item(self, rng: random.Random, newer: bool) -> Item:
        (task,) = rng.choices(list(TEXT_SHARES), TEXT_SHARES.values())
        if task == "facts" and newer and rng.random() < 0.5:
            return rng.choice(self.news)
        if task in ("facts", "sums"):
            return rng.choice(self._told[task])
        while True:
            made = spelling(rng) if task == "backwards" else date(rng.randint(1, DAYS), rng.randint(1, 12))
            if made.answer not in self._untold:
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
