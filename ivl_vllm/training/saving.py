"""Folders that are whole or absent: a run that is killed at any moment leaves its last checkpoint loadable.

Everything is written into `.unfinished` inside the output folder, flushed to the disk, and only then renamed into its
place. A checkpoint is one rename. The output folder itself takes its files one by one; `config.json`, without which
no loader accepts a folder, goes first and comes last, so that old and new files are never taken for one model.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ivl_vllm.training.lora import is_lora, merge_state

UNFINISHED = ".unfinished"
ADAPTER = "adapter"
_PREFIX = "checkpoint-"


class TrainingDivergedError(RuntimeError):
    """Loss or weights are no longer finite; the message says what is kept and what to change."""


def flush_folder(folder: Path) -> None:
    """Bring every file and folder below `folder` to the disk (fsync)."""
    for root, _, names in os.walk(folder):
        for path in (*(os.path.join(root, name) for name in names), root):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def publish_folder(stage: Path, target: Path) -> None:
    """Make `stage` the folder `target` in one step; both lie on one file system.

    Args:
        stage: A finished folder.
        target: Its name from now on. What lies there is replaced.
    """
    flush_folder(stage)
    if target.exists():
        # A folder that is not empty cannot be renamed over. The old one stays whole beside the new one.
        os.replace(target, stage.with_name(f"replaced-{target.name}"))
    os.replace(stage, target)
    flush_folder_entry(target.parent)


def flush_folder_entry(folder: Path) -> None:
    """Bring the list of a folder's names to the disk, and so the renames in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_files(stage: Path, target: Path) -> None:
    """Move the files of `stage` into the existing folder `target`, which is no model until the last one is there.

    Args:
        stage: A finished folder with a `config.json`.
        target: Folder that takes the files; weights of an earlier run that have no successor are removed.
    """
    flush_folder(stage)
    (target / "config.json").unlink(missing_ok=True)
    # Else a model in one file would lie beside the shards of an earlier one.
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    flush_folder_entry(target)
    for path in sorted(stage.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    flush_folder_entry(target)


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in an output folder, oldest step first."""
    found = [path for path in output.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(_PREFIX) :]))


def cast_state(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating tensors in `dtype`; names that share storage (tied layers) go on sharing it."""
    done: dict[tuple, torch.Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in done:
            done[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        result[name] = done[key]
    return result


class SafeSaving(Trainer):
    """The saving half of the trainer: atomic folders, merged adapters, a dtype for the result, no broken weights."""

    # Set by the trainer: called with (the folder that is being written, the folder that it becomes).
    _on_save: Callable[[Path, Path], None] | None = None
    _staging = False
    # Set while the result is written; checkpoints keep the fp32 master weights.
    _result_dtype: torch.dtype | None = None

    def save_result(self, output: Path, dtype: torch.dtype) -> None:
        """Write the trained network into `output` as an ordinary folder. Every process calls this.

        Args:
            output: The run's output folder.
            dtype: Dtype of the written weights. The model itself is left as it is, sharded or not.

        Raises:
            TrainingDivergedError: A weight is not finite; nothing was written.
        """
        self.check_weights()
        stage = self._clear_stage(output) / "result"
        self._result_dtype = dtype
        try:
            self.save_model(str(stage), _internal_call=True)
        finally:
            self._result_dtype = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_files(stage, output)
            shutil.rmtree(output / UNFINISHED)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Value network")

    def check_weights(self) -> None:
        """Refuse to go on, on every process at once, where a weight of any of them is not finite.

        Raises:
            TrainingDivergedError: With the last good checkpoint.
        """
        local = (getattr(p, "_local_tensor", p) for p in self.model.parameters())
        broken = sum((~torch.isfinite(p.detach()).all()).float() for p in local)
        broken = torch.as_tensor(broken, dtype=torch.float32, device=self.args.device)
        if self.accelerator.reduce(broken, "sum").item():
            self.stop_diverged("weights are not finite")

    def stop_diverged(self, what: str) -> None:
        """Raise the error that tells what is kept."""
        kept = list_checkpoints(Path(self.args.output_dir))
        tale = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written"
        raise TrainingDivergedError(
            f"training diverged: {what} at step {self.state.global_step}; {tale}. "
            "Lower --learning_rate, lengthen --warmup_steps or lower --max_grad_norm"
        )

    def _clear_stage(self, output: Path) -> Path:
        stage = output / UNFINISHED
        if self.args.should_save:
            # What a killed run left there is not finished and never will be.
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        return stage

    def _get_output_dir(self, trial: Any) -> str:
        output = super()._get_output_dir(trial)
        return os.path.join(output, UNFINISHED) if self._staging else output

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_weights()
        output = Path(self._get_output_dir(trial))
        stage = self._clear_stage(output) / f"{_PREFIX}{self.state.global_step}"
        target = output / stage.name
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(stage):
            self.state.best_model_checkpoint = str(target)
        if self.args.should_save:
            self.state.save_to_json(str(stage / "trainer_state.json"))
            publish_folder(stage, target)
            self._remove_old_checkpoints(output, target)
            shutil.rmtree(output / UNFINISHED)
        self.accelerator.wait_for_everyone()

    def _remove_old_checkpoints(self, output: Path, newest: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit < 1:
            return
        found = list_checkpoints(output)
        best = self.state.best_model_checkpoint
        kept = {newest.name, *([Path(best).name] if best else [])}
        removable = [path for path in found if path.name not in kept]
        for path in removable[: max(0, len(found) - max(limit, len(kept)))]:
            # Out of sight first: half a checkpoint must not look like one.
            hidden = output / UNFINISHED / f"removed-{path.name}"
            os.replace(path, hidden)
            shutil.rmtree(hidden)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        network = self.accelerator.unwrap_model(self.model)
        state = network.state_dict() if state_dict is None else state_dict
        plain = network
        if is_lora(network):
            if self._result_dtype is None:
                # Beside the merged weights, in a folder of its own: transformers would add one that lies in the
                # model's folder to the merged weights once more.
                network.save_pretrained(folder / ADAPTER, state_dict=state, save_embedding_layers=False)
            plain, state = network.get_base_model(), merge_state(network, state)
        # Gathered from shards, tied layers are two tensors; as one, they are written once.
        tied = getattr(plain, "all_tied_weights_keys", {}).items()
        state = {**state, **{name: state[source] for name, source in tied if name in state and source in state}}
        if self._result_dtype is not None:
            state = cast_state(state, self._result_dtype)
        plain.save_pretrained(folder, state_dict=state)
        if self._result_dtype is not None:
            _write_dtype(folder / "config.json", self._result_dtype)
        if self.args.should_save:
            self.processing_class.save_pretrained(folder)
            if self._on_save is not None:
                is_staged = folder.parent.name == UNFINISHED
                place = folder.parent.parent / ("" if folder.name == "result" else folder.name) if is_staged else folder
                self._on_save(folder, place)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        network = self.accelerator.unwrap_model(self.model if model is None else model)
        # Sharded weights have a file of their own, adapter and all.
        if is_lora(network) and not self.is_fsdp_enabled:
            network.load_adapter(Path(resume_from_checkpoint) / ADAPTER, network.active_adapter, is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _write_dtype(path: Path, dtype: torch.dtype) -> None:
    """transformers writes the model's dtype into `config.json`; the weights beside it have another."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for part in (content, content.get("text_config")):
        if isinstance(part, dict):
            for name in ("dtype", "torch_dtype"):
                if name in part:
                    part[name] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
