"""How tokenizers are loaded, everywhere alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ivl_vllm.hub import ask_hub, find_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id in transformers' own format.

    Raises:
        ValueError: There is no such folder, no tokenizer in it, or none that can be read; says why in one line.
    """
    folder = find_folder(name)
    if folder is None:
        ask_hub(str(name))
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    # Beside a `tekken.json` transformers would take mistral-common's, which has neither chat templates nor all tokens.
    # Releases that do not know the argument would write it into what they save.
    is_known = hasattr(tokenization_auto, "_use_mistral_format")
    options = {"mistral_format": False} if is_known else {}
    try:
        return AutoTokenizer.from_pretrained(str(folder or name), trust_remote_code=trust_remote_code, **options)
    # Broken files give KeyError, TypeError and, from Rust, bare Exception too.
    except Exception as error:
        kinds = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "tekken.json")
        if folder and not any(any(folder.glob(kind)) for kind in kinds):
            raise ValueError("the folder has no tokenizer") from error
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise ValueError(f"its tokenizer cannot be read ({reason})") from error


def read_tokenizer_of(name: str, flag: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The same for what a flag of the command line names.

    Raises:
        ValueError: As `read_tokenizer`, with flag and name.
    """
    try:
        return read_tokenizer(name, trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{flag} {name}: no tokenizer could be loaded: {error}") from error
