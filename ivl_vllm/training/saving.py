"""What a run writes: checkpoints that can be resumed, and the result, an ordinary folder in the dtype that is wanted.

`folders` says how they come to be whole or absent.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ivl_vllm.training.divergence import StopsDiverged
from ivl_vllm.training.folders import PREFIX, UNFINISHED, list_checkpoints, publish_files, publish_folder
from ivl_vllm.training.lora import is_lora, merge_state

ADAPTER = "adapter"


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


class SafeSaving(StopsDiverged):
    """The saving half of the trainer: atomic folders, merged adapters, a dtype for the result, no broken weights."""

    # Set by the trainer: called with (the folder that is being written, the folder that it becomes).
    _on_save: Callable[[Path, Path], None] | None = None
    _staging = False
    # Set while the result is written; checkpoints keep the fp32 master weights.
    _result_dtype: torch.dtype | None = None
    # What the network's configuration said of its cache before training switched it off.
    _use_cache: bool | None = None

    def save_result(self, output: Path, dtype: torch.dtype) -> None:
        """Write the trained network into `output` as an ordinary folder. Every process calls this.

        Args:
            output: The run's output folder.
            dtype: Dtype of the written weights. The model itself is left as it is, sharded or not.

        Raises:
            TrainingDivergedError: A step was broken or a weight is not finite; nothing was written.
        """
        self.check_finite()
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
        self.check_finite()
        output = Path(self._get_output_dir(trial))
        stage = self._clear_stage(output) / f"{PREFIX}{self.state.global_step}"
        target = output / stage.name
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == stage:  # transformers' own text may begin with "./"
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
        if not self.args.should_save:  # transformers from 5.23 on asks every process
            return
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
            _write_config(folder / "config.json", self._result_dtype, self._use_cache)
        self.processing_class.save_pretrained(folder)
        if self._on_save is not None:
            is_staged = folder.parent.name == UNFINISHED
            place = folder.parent.parent / ("" if folder.name == "result" else folder.name) if is_staged else folder
            self._on_save(folder, place)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self._read_back(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and the place in the schedule come from the checkpoint; rate and decay are those given now.

        A schedule that lowers the rate by what it sees goes on from the checkpoint's rate.
        """
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        given = [{name: group[name] for name in ("initial_lr", "weight_decay") if name in group} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups
        for group, settings in zip(groups, given, strict=True):
            group.update(settings)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            rates = [b * f(scheduler.last_epoch) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates  # what the next line of the log tells

    def _load_best_model(self) -> None:
        if not self._read_back(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _read_back(self, checkpoint: str, model: torch.nn.Module) -> bool:
        """Load a checkpoint's weights, unless they are sharded and have files of their own.

        transformers' trainer would look for an adapter beside the merged weights, and miss the experts of a mixture,
        which have other names in a file than in the network.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        network = self.accelerator.unwrap_model(model)
        if is_lora(network):
            network.load_adapter(Path(checkpoint) / ADAPTER, network.active_adapter, is_trainable=True)
        else:
            network.load_state_dict(type(network).from_pretrained(checkpoint, dtype=torch.float32).state_dict())
        return True


def _write_config(path: Path, dtype: torch.dtype, use_cache: bool | None) -> None:
    """transformers writes what holds in training: the model's dtype, where the weights have another, and no cache."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for part in (content, content.get("text_config")):
        if isinstance(part, dict):
            for name in ("dtype", "torch_dtype"):
                if name in part:
                    part[name] = str(dtype).removeprefix("torch.")
            if use_cache is not None and "use_cache" in part:
                part["use_cache"] = use_cache
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
