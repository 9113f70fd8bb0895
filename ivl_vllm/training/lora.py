"""A LoRA adapter on the value network: how it is put on, and how it is merged into ordinary weights on saving."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRAPPER = "base_model.model."


def add_lora(model: "PreTrainedModel", rank: int, seed: int) -> Any:
    """Put an adapter on every linear layer that is to be trained but the output layer, and freeze the rest.

    Args:
        model: The value network, in fp32.
        rank: Rank of the adapter; its scale is 2, whatever the rank.
        seed: Seed of the adapter's random half, so that runs repeat and all processes start alike.

    Returns:
        A `peft.PeftModel` whose output is that of `model` until it is trained.

    Raises:
        ValueError: PEFT is not installed, or finds no linear layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"--lora_rank {rank} needs PEFT: pip install 'ivl-vllm[train]', or leave it out") from error
    from transformers import set_seed

    set_seed(seed)
    weights = {name: getattr(layer, "weight", None) for name, layer in model.named_modules()}
    frozen = [name for name, weight in weights.items() if isinstance(weight, torch.Tensor) and not weight.requires_grad]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=frozen or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def warn_rank(model: "PreTrainedModel", rank: int) -> None:
    """Print a warning where an adapter of this rank is larger than what it adapts."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    if isinstance(hidden, int) and rank > hidden:
        print(
            f"warning: --lora_rank {rank} is above the value network's hidden size of {hidden}, so the adapter is "
            "larger than the weights that it changes; lower it, or leave it out to train all weights",
            flush=True,
        )


def is_lora(model: torch.nn.Module) -> bool:
    """Whether `model` carries an adapter; imports PEFT for none that does not."""
    if not hasattr(model, "peft_config"):
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def merge_state(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the plain model with the adapter in them: W + scale · B A.

    Works on the gathered weights alone, so it serves a sharded model too, and the model that is trained stays as it
    is.

    Args:
        model: The `PeftModel`, for each layer's scale and orientation.
        state: Its whole state, any device.

    Returns:
        Name in the plain model → tensor, in the dtype of W; tied layers go on sharing their storage.
    """
    adapter = model.active_adapter
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "scaling")}
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner and leaf == "weight" and owner in layers:
            down, up = (state[f"{owner}.lora_{part}.{adapter}.weight"].float() for part in "AB")
            delta = layers[owner].scaling[adapter] * (up @ down)
            # GPT-2's Conv1D keeps its weight as [in, out].
            delta = delta.T if layers[owner].fan_in_fan_out else delta
            tensor = (tensor.float() + delta).to(tensor.dtype)
        merged[name.removeprefix(_WRAPPER).replace(".base_layer.", ".")] = tensor
    return merged
