"""`ivl map-vocab`: two tokenizers in, a map file and a few lines on its worth out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ivl_vllm.tokenizer import read_tokenizer_of
from ivl_vllm.training.folders import check_writable
from ivl_vllm.vocab import INPUTS, METHODS, UNMAPPED

_DESCRIPTION = """\
Tie the vocabulary of a value network to that of a base with another tokenizer.

  ivl map-vocab --base BASE --value VALUE --output map.safetensors
  vllm serve BASE --logits-processor ivl --additional-config \\
    '{"ivl": {"values": {"default": {"model": "VALUE", "vocab_map": "map.safetensors"}}}}'

Models of one family need no map, however far their vocabularies are padded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--base", required=True, metavar="BASE", help="base: folder with a tokenizer, or a hub id")
    parser.add_argument("--value", required=True, metavar="VALUE", help="value network: the same")
    parser.add_argument(
        "--output", required=True, metavar="FILE", type=os.path.expanduser, help="the map, a .safetensors file"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="nearest",
        help="which value token's logit is added to a base token (default: %(default)s)\n"
        "exact:   the one that stands for the same bytes; special tokens by role\n"
        "nearest: else the same letters in other case, else a close spelling; never another number\n"
        "aligned: exact, else the one that stands at the same places of --corpus",
    )
    parser.add_argument(
        "--input",
        choices=INPUTS,
        default="last",
        help="how the value network reads a base token that it has no exact partner for (default: %(default)s)\n"
        "nearest: as the partner from --method, else as the longest piece that its own tokenizer cuts\n"
        "last:    as the last of those pieces\n"
        "mean:    as all of them, the mean of their embeddings",
    )
    parser.add_argument(
        "--unmapped",
        choices=UNMAPPED,
        default="keep",
        help="what is added to base tokens without a partner (default: %(default)s)\n"
        "keep:  nothing\n"
        "mean:  the mean of all value logits\n"
        "first: the logit of the first piece that the value network's tokenizer cuts",
    )
    parser.add_argument(
        "--corpus",
        metavar="FILE",
        type=os.path.expanduser,
        help="text, a line each, or .jsonl: learnt from by aligned, and weighs the printed coverage",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizers")


def run(arguments: argparse.Namespace) -> None:
    """Make, write and describe the map.

    Raises:
        ValueError: Something that the user can mend; names the flag.
    """
    output = Path(arguments.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: give the name of a file in a folder that exists")
    check_writable(output.absolute().parent, "--output")
    if arguments.corpus is not None and not os.path.isfile(arguments.corpus):
        raise ValueError(f"--corpus {arguments.corpus}: no such file")

    base, value = (
        read_tokenizer_of(getattr(arguments, name), f"--{name}", arguments.trust_remote_code)
        for name in ("base", "value")
    )
    from ivl_vllm.vocab.make import fill_unmapped, make_vocab_map
    from ivl_vllm.vocab.report import describe_map

    kept = make_vocab_map(base, value, arguments.method, arguments.input, "keep", arguments.corpus, progress=True)
    # Before the file is written: it reads the corpus, which may be broken.
    description = describe_map(kept, base, value, arguments.corpus)
    fill_unmapped(kept, base, value, arguments.unmapped).save(output)
    print(f"{description}\nwritten to {output}")
