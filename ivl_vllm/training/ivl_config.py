"""`ivl_config.json`: what a value network was trained against. Imports neither torch nor transformers."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

CONFIG_NAME = "ivl_config.json"
FORMAT_VERSION = 1
SCHEMES = ("residual", "cascade", "cascade+text")
NORMS = ("l1", "l2", "none")


@dataclass(frozen=True)
class IVLConfig:
    """Provenance of a value network; written beside its weights, checked whenever it is made or read.

    Args:
        base: Folder or hub id of the base model that the value network was trained against.
        scheme: How value and base are joined; `residual` is `z = B0(x) + V(x)`.
        norm: Norm of the regulariser: `l1`, `l2` or `none`.
        norm_weight: Its weight λ.
        vocab_size: Columns of the value network's logits.
        vocabulary_fingerprint: `ivl_vllm.vocab.fingerprint.vocabulary_fingerprint` of its tokenizer.
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
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            self._refuse(
                "format_version", f"this ivl-vllm reads version {FORMAT_VERSION}: install the one that wrote it"
            )
        if not isinstance(self.base, str) or not self.base:
            self._refuse("base", "expected the name or folder of the base model")
        if self.scheme not in SCHEMES:
            self._refuse("scheme", f"this ivl-vllm knows {', '.join(SCHEMES)}")
        if self.norm not in NORMS:
            self._refuse("norm", f"expected one of {', '.join(NORMS)}")
        if not _is_number(self.norm_weight) or self.norm_weight < 0:
            self._refuse("norm_weight", "expected a finite number that is not negative")
        if not isinstance(self.vocab_size, int) or isinstance(self.vocab_size, bool) or self.vocab_size < 1:
            self._refuse("vocab_size", "expected a positive whole number")
        fingerprint = self.vocabulary_fingerprint
        if not isinstance(fingerprint, str) or len(fingerprint) != 64 or set(fingerprint) - set("0123456789abcdef"):
            self._refuse("vocabulary_fingerprint", "expected 64 hexadecimal digits")
        if not isinstance(self.versions, dict):
            self._refuse("versions", "expected an object of package names and versions")

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{CONFIG_NAME}: {name} is {getattr(self, name)!r}; {expected}")

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
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            content: Any = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no JSON object")
        # Before all else: a later layout has fields that are unknown here, and its version is the thing to name.
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version is {version!r}; this ivl-vllm reads {FORMAT_VERSION}: "
                "install the one that wrote it"
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"{path} has an unknown field: {', '.join(unknown)}")
        if missing := sorted(known - {"versions"} - content.keys()):
            raise ValueError(f"{path} lacks the field {', '.join(missing)}")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path.parent}/{error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
