"""`ivl_run.json` in every checkpoint: which run it belongs to, so that no other run goes on from it unnoticed.

Held are the settings that decide what is being fitted, and hashes of what they name. How long and how fast a run
trains, and what it logs, may change when it is resumed.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ivl_vllm.training.arguments import ValueArguments
from ivl_vllm.training.files import read_header
from ivl_vllm.training.ivl_config import IVLConfig

RECORD_NAME = "ivl_run.json"
FORMAT_VERSION = 3
_COMPARED = (
    "scheme",
    "norm",
    "norm_weight",
    "norm_positions",
    "base_mix",
    "base_temperature",
    "base_noise",
    "lora_rank",
    "zero_output_layer",
    "eval_fraction",
    "long_examples",
)
_IN_IVL_CONFIG = ("scheme", "norm", "norm_weight", "norm_positions", "base_temperature", "base_noise")
_SPELLED = {"norm_weight": "--norm_weight (--lambda)"}
_SPELLED |= {"rows_per_step": "--batch_size × --gradient_accumulation_steps × processes"}


@dataclass(frozen=True)
class RunRecord:
    """What decides a run's result.

    Args:
        settings: Flag, without its dashes → value. Those of models and files are names.
        contents: Flag that names a model or a file → hash of what was found there.
    """

    settings: dict[str, Any]
    contents: dict[str, str]

    @classmethod
    def of(cls, args: ValueArguments, seed: int, names: dict[str, Any], models: dict[str, str]) -> "RunRecord":
        """The record of a run that is about to start.

        Args:
            args: Its settings.
            seed: Its seed, which deals out data and held-out data.
            names: `base`, `init` and `more_bases` → names, as `models.locate_model` returns them.
            models: The same → fingerprints.
        """
        settings = {name: getattr(args, name) for name in _COMPARED}
        settings.update(names, data=args.data, init_config=args.init_config, seed=seed)
        contents = {**models, "data": _hash_file(Path(os.path.expanduser(args.data)))}
        if args.init_config:
            path = Path(os.path.expanduser(args.init_config))
            contents["init_config"] = _hash_file(path / "config.json" if path.is_dir() else path)
        return cls(settings, contents)

    def add_text(self, flag: str, path: str | None, text: str) -> None:
        """Hold a text that `--flag` named, or that was there without it."""
        self.settings[flag], self.contents[flag] = path, hashlib.sha256(text.encode()).hexdigest()

    def add_batches(self, args: Any) -> None:
        """Hold what decides which rows a step sees: the place in an epoch is found again by counting steps."""
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.settings.update(rows_per_step=rows, packing=args.packing, max_length=args.max_length)

    def write(self, folder: Path) -> None:
        """Write `ivl_run.json` into `folder`, which exists."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        (folder / RECORD_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "RunRecord | None":
        """The record in a checkpoint, or None where there is none.

        Raises:
            ValueError: The file is no record, or one of another version.
        """
        path = folder / RECORD_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            settings, contents = dict(content["settings"]), dict(content["contents"])
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version is {content['format_version']!r}, expected {FORMAT_VERSION}")
            return cls(settings, contents)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: no record of a run ({error}); delete it to resume without a comparison"
            ) from error

    def check_resume(self, folder: Path) -> None:
        """Refuse to go on from another run's checkpoint; a checkpoint without a record is compared as far as it goes.

        Args:
            folder: The checkpoint.

        Raises:
            ValueError: Something differs; the message names each flag and both values.
        """
        earlier = RunRecord.read(folder)
        if earlier is None:
            config = IVLConfig.read(folder)
            known = {} if config is None else {name: getattr(config, name) for name in _IN_IVL_CONFIG}
            earlier = RunRecord(known, {})
            print(
                f"warning: --resume {folder}: the checkpoint has no {RECORD_NAME} (an older ivl-vllm wrote it), so its "
                "base, start and data are not compared with those given now",
                file=sys.stderr,
                flush=True,
            )
        differences = [text for name in self.settings if (text := self._differs(earlier, name))]
        if differences:
            raise ValueError(
                f"--resume {folder}: that checkpoint is of another run: {'; '.join(differences)}. Give the earlier "
                "values to go on with that run; for a new one leave --resume out and choose another --output "
                f"(--init {folder} starts from these weights)"
            )

    def _differs(self, earlier: "RunRecord", name: str) -> str | None:
        if name not in earlier.settings:
            return None
        old, new = earlier.settings[name], self.settings[name]
        flag = _SPELLED.get(name, f"--{name}")
        if name in earlier.contents and name in self.contents:
            if earlier.contents[name] == self.contents[name]:
                return None  # moved or renamed at most
            # All weights that it gave are in the checkpoint, except those under an adapter.
            if name == "init" and old == new and not self.settings["lora_rank"]:
                return None
            if old == new is None:
                return f"{flag} is not given, and what it replaces has changed"
            if old == new:
                return f"{flag} {_show(new)} has other content now"
        return None if old == new else f"{flag} was {_show(old)} and now is {_show(new)}"


def check_shapes(value: PreTrainedModel, folder: Path, flag: str) -> None:
    """Refuse weights that do not fit into the network, in one line; torch would name every one of them.

    Args:
        value: The value network as it starts, before any adapter or wrapper.
        folder: The checkpoint.
        flag: The flag that decides the network's size.

    Raises:
        ValueError: Another architecture, or a weight of another shape.
    """
    fix = f"give the {flag} that the run started with"
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {folder}: {path} cannot be read: {error}") from error
    for name in ("model_type", "num_hidden_layers"):
        old, new = content.get(name), getattr(value.config, name, None)
        if old is not None and new is not None and old != new:
            raise ValueError(f"--resume {folder}: its {name} is {old}, and that of {flag} is {new}; {fix}")
    own = {name: list(tensor.shape) for name, tensor in value.state_dict().items()}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, (_, shape) in read_header(file).items():
            if name in own and shape != own[name]:
                raise ValueError(
                    f"--resume {folder}: its {name} has the shape {shape}, and that of {flag} {own[name]}; {fix}"
                )


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _show(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    return ", ".join(value) if isinstance(value, list) else str(value)
