"""The README.md of a value network: what it is, what it was trained on, how to serve it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ivl_vllm.training.curves import PNG_NAME, last_values, read_log
from ivl_vllm.training.ivl_config import IVLConfig


def serve_command(base: str, value: str | Path, takes: Sequence[str] = ()) -> str:
    """The shell line that serves `base` with the value network `value` beside it.

    Args:
        base: Folder or hub id.
        value: Folder.
        takes: What the server takes from that folder: `chat-template`, `generation-config`.
    """
    settings = json.dumps({"ivl": {"value_model": str(value)}})
    files = {"chat-template": f"{value}/chat_template.jinja", "generation-config": str(value)}
    words = ["vllm", "serve", base, "--logits-processor", "ivl", "--additional-config", settings]
    return shlex.join([*words, *(word for name in takes for word in (f"--{name}", files[name]))])


@dataclass(frozen=True)
class Card:
    """What the model card tells beyond `ivl_config.json`.

    Args:
        config: Provenance of the value network.
        init: What it started from.
        zero_output_layer: Whether its output layer started at zero.
        lora_rank: Rank of the adapter that was trained and merged; 0 for none.
        data: File of demonstrations.
        examples: Answers that were trained.
        parameters: Trained parameters.
        settings: Trainer setting → value, the ones worth a line.
    """

    config: IVLConfig
    init: str
    zero_output_layer: bool
    data: str
    examples: int
    parameters: int
    settings: dict[str, object]
    lora_rank: int = 0

    def render(self, folder: Path, place: Path | None = None) -> str:
        """Markdown with the metadata block that the Hugging Face Hub reads.

        Args:
            folder: Where the files lie now; the curves there are linked and their last values told.
            place: Where they will lie, whose name is the title; left out, the same.
        """
        config = self.config
        place = (folder if place is None else place).resolve()
        # The hub wants a hub id there; a local path would make it refuse the upload.
        base_line = [] if Path(config.base).is_absolute() else [f"base_model: {config.base}"]
        start = f"`{self.init}`" + (", output layer zeroed" if self.zero_output_layer else "")
        if self.lora_rank:
            start += f", trained through a LoRA adapter of rank {self.lora_rank}, merged"
        rows = {
            "Base it was trained against": f"`{config.base}`",
            "Scheme": f"{config.scheme}: z = B0(x) + {'V(x)' if config.scheme == 'residual' else 'V(e)'}",
            **{name.capitalize(): text for name, text in config.describe_training().items()},
            "Started from": start,
            "Trained parameters": f"{self.parameters:,}",
            "Demonstrations": f"`{self.data}`, {self.examples:,} answers",
            "Vocabulary": f"{config.vocab_size:,} columns, fingerprint `{config.vocabulary_fingerprint[:16]}…`",
            **{name.replace("_", " ").capitalize(): f"{value}" for name, value in self.settings.items()},
            **{f"Last values, {label}": text for label, text in last_values(read_log(folder)).items()},
            "Versions": ", ".join(f"{name} {version}" for name, version in config.versions.items()),
        }
        lines = [
            "---",
            "library_name: transformers",
            *base_line,
            "tags:",
            "- ivl",
            "- inverse-value-learning",
            "---",
            "",
            f"# {place.name}",
            "",
            "A *value network* of Inverse Value Learning (arXiv 2410.21027): its logits are added to those of a base",
            "model of the same vocabulary, which may be larger than the one it was trained against. Alone it is no",
            "language model to talk to.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            *([f"![loss, ce and norm over the steps]({PNG_NAME})", ""] if (folder / PNG_NAME).is_file() else []),
            "## Serve it",
            "",
            "With `ivl-vllm` installed; `BASE` is the base above or a larger one of its family:",
            "",
            "```bash",
            serve_command("BASE", place, config.takes),
            "```",
            "",
            'Requests then ask for it: `{"vllm_xargs": {"ivl": 1.0}}` over HTTP, or offline',
            '`SamplingParams(extra_args={"ivl": 1.0})`. A request that does not ask gets the base alone.',
            "",
        ]
        return "\n".join(lines)

    def write(self, folder: Path, place: Path | None = None) -> None:
        """Write `README.md` and `ivl_config.json` into an existing folder that will become `place`."""
        (folder / "README.md").write_text(self.render(folder, place), encoding="utf-8")
        self.config.write(folder)
