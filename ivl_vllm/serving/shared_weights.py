"""What value networks share: matrices that are equal byte for byte, and the output projection where it is one of them.

An expert that is a LoRA adapter merged into a small base, as `ivl train --lora_rank` makes it, has that base's
embeddings and output layer. Beside its base (`minus`) they are held once, and the weighted hidden states of the two are
added up before they are projected, once: `w · expert - w · minus = w · (h_expert - h_minus) · matrix`. Where the logits
of each are wanted, their rows go through the output layer in one go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ivl_vllm.serving.network import Network, head_probe, is_linear
from ivl_vllm.settings import NetworkSource

# vLLM shows what is logged under its own name and nothing else.
logger = init_logger(f"vllm.{__name__}")

# Bytes that are compared at a time.
CHUNK = 1 << 26


def share_equal_weights(model: nn.Module, others: Sequence[nn.Module]) -> int:
    """Has `model` use the matrices of `others` that equal its own of the same name; its own are freed.

    Tables of embeddings and output layers are shared as modules, with all that was derived from their weights.

    Args:
        model: a value network, before anything refers to its weights.
        others: value networks that are loaded already.

    Returns:
        The bytes that it no longer holds.
    """
    saved = 0
    for other in others:
        theirs = dict(other.named_parameters(remove_duplicate=False))
        for name, own in model.named_parameters():
            if name in theirs and _equal(own.data, theirs[name].data):
                saved += own.numel() * own.element_size()
                own.data = theirs[name].data
        modules = dict(other.named_modules(remove_duplicate=False))
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, VocabParallelEmbedding) and _same_table(module, modules.get(name)):
                model.set_submodule(name, modules[name])
    return saved


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two matrices in different memory have the same bytes."""
    if one.dim() < 2 or not one.numel() or one.data_ptr() == other.data_ptr():
        return False
    if (one.shape, one.stride(), one.dtype, one.device) != (other.shape, other.stride(), other.dtype, other.device):
        return False
    ours, theirs = (matrix.reshape(-1).view(torch.uint8).split(CHUNK) for matrix in (one, other))
    return all(map(torch.equal, ours, theirs))


def _same_table(module: nn.Module, other: nn.Module | None) -> bool:
    """Whether all that two tables hold is one and the same."""
    if type(module) is not type(other) or type(module.quant_method) is not type(other.quant_method):
        return False
    own, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (module, other))
    return own.keys() == theirs.keys() and all(
        tensor.numel()
        and tensor.data_ptr()
        and tensor.data_ptr() == theirs[name].data_ptr()
        and tensor.shape == theirs[name].shape
        for name, tensor in own.items()
    )


def projection_groups(networks: Sequence[Network], sources: Sequence[NetworkSource]) -> list[tuple[int, ...]]:
    """Numbers of the networks, those together whose hidden states can be added up before they are projected.

    Args:
        networks: all value networks.
        sources: where they come from; networks with different vocabulary maps stay apart.
    """
    groups: list[tuple[int, ...]] = []
    for number, network in enumerate(networks):
        for place, group in enumerate(groups):
            first = group[0]
            if sources[first].vocab_map == sources[number].vocab_map and _one_projection(networks[first], network):
                groups[place] = (*group, number)
                break
        else:
            groups.append((number,))
    for group in groups:
        if len(group) > 1:
            names = ", ".join(sources[number].model for number in group)
            logger.info("ivl: value networks with one output layer, projected once: %s", names)
    return groups


@torch.inference_mode()
def _one_projection(one: Network, other: Network) -> bool:
    """Whether the logits of both are the same linear function of their hidden states."""
    head = getattr(one.model, "lm_head", None)
    shared = head is not None and head is getattr(other.model, "lm_head", None)
    if not _on_all_ranks(shared and (one.head is None) == (other.head is None)):
        return False
    probe = head_probe(one.no_hidden(2))
    # All ranks have to project as often.
    linear, ours, theirs = is_linear(one.value_logits, probe), one.value_logits(probe), other.value_logits(probe)
    return _on_all_ranks(linear and torch.equal(ours.float(), theirs.float()))


def _on_all_ranks(answer: bool) -> bool:
    """Whether all tensor-parallel ranks say so: each has its own part of a matrix, and projects when the others do."""
    if get_tensor_model_parallel_world_size() == 1:
        return answer
    votes = torch.tensor(int(answer))
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return bool(votes.item())
