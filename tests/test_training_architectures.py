"""The joint loss with causal LMs of many kinds, as base and as value, against plain autograd on whole logits."""

import pytest
import torch
import transformers
from objective_tools import SCHEMES, VOCAB, assert_same, logits_of, make_batch, naive, qwen2

from ivl_vllm.training.frozen_bases import FrozenBases
from ivl_vllm.training.joint_loss import JointLoss

COMMON = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
KINDS = {
    # Its embeddings are narrower than its layers.
    "OPTForCausalLM": {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    },
    "GPT2LMHeadModel": GPT,
    # A bias in the output layer.
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "PhiForCausalLM": COMMON,
    "GPTNeoXForCausalLM": COMMON,
    # Positions by a bias on attention, and a norm after the embeddings.
    "BloomForCausalLM": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "FalconForCausalLM": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    # Experts.
    "Qwen3MoeForCausalLM": {
        **COMMON,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    # No attention.
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    # Scaled logits: not chunked.
    "CohereForCausalLM": COMMON,
    "GraniteForCausalLM": {**COMMON, "logits_scaling": 3.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_many_kinds_as_base_and_as_value(kind):
    torch.manual_seed(3)
    architecture = getattr(transformers, kind)
    unusual = architecture(architecture.config_class(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **KINDS[kind]))
    for parameter in unusual.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch()
    for scheme in SCHEMES:
        for base, value in ((qwen2(), unusual.eval()), (unusual.eval(), qwen2())):
            value.requires_grad_(True)
            loss = JointLoss(value, FrozenBases([base]), scheme=scheme, chunk=4)
            assert not loss.notes()
            sums, _ = loss(value, dict(batch), 0)
            assert_same(value, sums, naive(value, logits_of(base, batch), batch, scheme, "l1", 1.0))
