"""A `nearest` map of two vocabularies of 150,000 tokens, as large as today's: time, memory, and that it is right."""

import random
import re
import string
import subprocess
import sys

from tokenizers import pre_tokenizers
from vocab_kinds import from_words

from ivl_vllm.vocab.vocab_map import VocabMap

SIZE = 150_000
SECONDS, GIBIBYTES = 300, 4
ENDS = ["", "s", "ed", "ing", "er", "ly", "ness", "al", "tion", "ment", "es", "able"]


def words(count):
    """Different words in the shapes of a real vocabulary: with and without space, capitals, numbers, symbols, bytes."""
    draw = random.Random(0)
    syllables = [
        start + vowel + end
        for start in [*"bcdfghjklmnprstvwz", "st", "tr", "pl", "gr", "ch", "sh"]
        for vowel in "aeiou"
        for end in ("", "n", "r", "s", "l", "t", "nd", "ck")
    ]
    found = set()
    while len(found) < count:
        word = "".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 2, 3, 3)))) + draw.choice(ENDS)
        kind = draw.random()
        if kind < 0.05:
            word = "".join(draw.choices(string.digits, k=draw.randint(2, 6)))
        elif kind < 0.1:
            word = draw.choice("_.(/-") + word
        elif kind < 0.15:
            word = "".join(draw.choices("éñ中国日本語äöüß", k=draw.randint(2, 5)))
        elif kind < 0.4:
            word = word.capitalize()
        found.add(draw.choice(("", " ")) + word)
    return draw.sample(sorted(found), count)


def test_150_000_by_150_000(tmp_path):
    special = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    half = (SIZE - special) // 2
    everything = words(3 * half)
    parts = [everything[start : start + half] for start in range(0, 3 * half, half)]
    for name, own in {"base": parts[1], "value": parts[2]}.items():
        tokenizer = from_words(parts[0] + own, ["<|endoftext|>"], eos_token="<|endoftext|>")
        assert SIZE - 2 <= len(tokenizer) <= SIZE
        tokenizer.save_pretrained(tmp_path / name)
    code = (
        "import resource, sys; from ivl_vllm import cli; status = cli.main(sys.argv[1:]); "
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    arguments = [f"--base={tmp_path}/base", f"--value={tmp_path}/value", f"--output={tmp_path}/map"]
    done = subprocess.run(
        [sys.executable, "-c", code, "map-vocab", "--method=nearest", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"KiB (\d+)", done.stdout)[1]) < GIBIBYTES << 20
    made = VocabMap.load(tmp_path / "map")
    shared = slice(special, special + half)
    assert (made.columns[shared] == range(special, special + half)).all()
    # Of those that only the base has, some differ by their ending or by a capital.
    assert 0.02 < (made.columns[special + half :] >= 0).mean() < 0.5
