"""`ivl_config.json`: what a value network was trained against. Imports neither torch nor transformers."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from ivl_vllm.training.files import read_json

CONFIG_NAME = "ivl_config.json"
FORMAT_VERSION = 2
SCHEMES = ("residual", "cascade", "cascade+text")
NORMS = ("l1", "l2", "none")
NORM_POSITIONS = ("answer", "all")
BASE_MIXES = ("draw", "average")
TAKES = ("chat-template", "generation-config")
_OTHER_VERSION = f"this ivl-vllm reads version {FORMAT_VERSION}: install the one that wrote it"


@dataclass(frozen=True)
class IVLConfig:
    """Provenance of a value network; written beside its weights, checked whenever it is made or read.

    Args:
        base: Folder or hub id of the base model that the value network was trained against.
        scheme: How value and base are joined; `residual` is `z = B0(x) + V(x)`.
        norm: Norm of the regulariser: `l1`, `l2` or `none`.
        norm_weight: Its weight λ.
        norm_positions: Where it was taken: at `answer` tokens, or at `all` that are no padding.
        more_bases: Further bases that the value network was trained against.
        base_mix: With further bases: `draw` took one for each step, `average` the mean of all.
        base_temperature: What the bases' logits were divided by in training.
        base_noise: Standard deviation of the noise on the bases' logits in training.
        vocab_size: Columns of the value network's logits.
        vocabulary_fingerprint: `ivl_vllm.vocab.fingerprint.vocabulary_fingerprint` of its tokenizer.
        takes: What a server takes from the folder, see `model_card.serve_command`.
        versions: Package name → version at training time.
        format_version: Version of this file's layout.

    Raises:
        ValueError: A field has the wrong type or a value that this version does not know; the message names it.
    """

    base: str
    scheme: str
    norm: str
    norm_weight: float
    vocab_size: int
    vocabulary_fingerprint: str
    norm_positions: str = "answer"
    more_bases: list[str] = field(default_factory=list)
    base_mix: str = "draw"
    base_temperature: float = 1.0
    base_noise: float = 0.0
    takes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            self._refuse("format_version", _OTHER_VERSION)
        if not isinstance(self.base, str) or not self.base:
            self._refuse("base", "expected the name or folder of the base model")
        if self.scheme not in SCHEMES:
            self._refuse("scheme", f"this ivl-vllm knows {', '.join(SCHEMES)}")
        if self.norm not in NORMS:
            self._refuse("norm", f"expected one of {', '.join(NORMS)}")
        if not _is_number(self.norm_weight) or self.norm_weight < 0:
            self._refuse("norm_weight", "expected a finite number that is not negative")
        if self.norm_positions not in NORM_POSITIONS:
            self._refuse("norm_positions", f"expected one of {', '.join(NORM_POSITIONS)}")
        if not isinstance(self.more_bases, list) or not all(isinstance(n, str) and n for n in self.more_bases):
            self._refuse("more_bases", "expected a list of names or folders of base models")
        if self.base_mix not in BASE_MIXES:
            self._refuse("base_mix", f"expected one of {', '.join(BASE_MIXES)}")
        if not _is_number(self.base_temperature) or self.base_temperature <= 0:
            self._refuse("base_temperature", "expected a finite number above 0")
        if not _is_number(self.base_noise) or self.base_noise < 0:
            self._refuse("base_noise", "expected a finite number that is not negative")
        if not isinstance(self.vocab_size, int) or isinstance(self.vocab_size, bool) or self.vocab_size < 1:
            self._refuse("vocab_size", "expected a positive whole number")
        fingerprint = self.vocabulary_fingerprint
        if not isinstance(fingerprint, str) or len(fingerprint) != 64 or set(fingerprint) - set("0123456789abcdef"):
            self._refuse("vocabulary_fingerprint", "expected 64 hexadecimal digits")
        if not isinstance(self.takes, list) or not all(name in TAKES for name in self.takes):
            self._refuse("takes", f"expected a list of {' and '.join(TAKES)}")
        if not isinstance(self.versions, dict):
            self._refuse("versions", "expected an object of package names and versions")

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{CONFIG_NAME}: {name} is {getattr(self, name)!r}; {expected}")

    def describe_training(self) -> dict[str, str]:
        """Readable lines on regularisation and bases, as far as the latter are not the default."""
        norm = "none"
        if self.norm != "none":
            where = ", at all positions" if self.norm_positions == "all" else ""
            norm = f"{self.norm}, λ = {self.norm_weight:g}{where}"
        rows = {"norm": norm}
        if self.more_bases:
            how = "one drawn for each step" if self.base_mix == "draw" else "logits averaged"
            rows["further bases"] = f"{', '.join(self.more_bases)} ({how})"
        if self.base_temperature != 1:
            rows["base temperature"] = f"{self.base_temperature:g}"
        if self.base_noise:
            rows["base noise"] = f"{self.base_noise:g}"
        return rows

    def write(self, folder: str | Path) -> Path:
        """Write `ivl_config.json` into `folder` (which exists) and return its path."""
        path = Path(folder) / CONFIG_NAME
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> "IVLConfig | None":
        """Read and check `folder/ivl_config.json`.

        Returns:
            The configuration, or None where there is no such file: any causal LM is a plain residual value network.

        Raises:
            ValueError: The file is no JSON object, lacks a field, has an unknown one, or a field is out of range.
        """
        path = Path(folder) / CONFIG_NAME
        content = read_json(path)
        if content is None:
            return None
        # Before all else: a later layout has fields that are unknown here, and its version is the thing to name.
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version is {version!r}; {_OTHER_VERSION}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"{path} has an unknown field: {', '.join(unknown)}")
        if missing := sorted(known - {"versions", "takes"} - content.keys()):
            raise ValueError(f"{path} lacks the field {', '.join(missing)}")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path.parent}/{error}") from error


def own_version() -> str:
    """The version of this package that is installed."""
    try:
        return metadata.version("ivl-vllm")
    except metadata.PackageNotFoundError:
        return "source tree"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
