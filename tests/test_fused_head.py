"""When a value network's output projection goes through the fused kernel, and what the log says where it does not."""

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ivl_vllm.serving import network as network_module

ROWS, WIDTH = 40, 16


class Model(nn.Module):
    """As much of a vLLM model as its output projection needs."""

    def __init__(self, bias=0.0, scale=1.0, soft_cap=None, tp_size=1, method=None, spread=1.0):
        super().__init__()
        weight = nn.Parameter(spread * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.lm_head = nn.Module()
        self.lm_head.weight = weight
        self.lm_head.quant_method, self.lm_head.tp_size = method or UnquantizedEmbeddingMethod(), tp_size
        self.bias, self.scale, self.soft_cap = bias, scale, soft_cap

    def compute_logits(self, hidden):
        logits = hidden @ self.lm_head.weight.to(hidden.dtype).t() * self.scale + self.bias
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


class QuantizedMethod:
    pass


def made(caplog, model):
    config = SimpleNamespace(
        get_vocab_size=lambda: ROWS, get_hidden_size=lambda: WIDTH, dtype=torch.float32, model="small"
    )
    with caplog.at_level(logging.INFO, logger=network_module.logger.name):
        network = network_module.Network(model, config, 8, ROWS)
        for _ in range(3):
            network.add_logits(torch.zeros(1, ROWS), torch.ones(1, WIDTH), torch.ones(1), None)
    return network, [record.getMessage() for record in caplog.records if "output projection" in record.getMessage()]


@pytest.mark.parametrize("mapped", [False, True])
def test_ids_beyond_all_tokens_are_read_as_the_last_one(mapped):
    """Some models have such ids for pieces of an image."""

    class Reads(Model):
        def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds):
            self.seen, self.address = input_ids.tolist(), input_ids.data_ptr()
            return torch.zeros(len(input_ids), WIDTH)

    config = SimpleNamespace(
        get_vocab_size=lambda: ROWS, get_hidden_size=lambda: WIDTH, dtype=torch.float32, model="small"
    )
    vocab_map = None
    if mapped:  # each of the base's tokens is the one before it
        columns = np.arange(ROWS, dtype=np.int32)
        vocab_map = SimpleNamespace(
            value_vocab=ROWS,
            base_vocab=ROWS,
            columns=columns,
            single=True,
            pieces=np.maximum(columns - 1, 0),
            piece_starts=np.arange(ROWS + 1),
        )
    model, ids = Reads(), torch.tensor([5, ROWS - 1, ROWS, ROWS + 100])
    network = network_module.Network(model, config, 8, ROWS, vocab_map=vocab_map, multimodal=True)
    network.forward(ids, ids, None, None)
    assert model.seen == ([4, *[ROWS - 2] * 3] if mapped else [5, *[ROWS - 1] * 3])
    # A text base has no such ids, and nothing is copied.
    if not mapped:
        network_module.Network(model, config, 8, ROWS).forward(ids, ids, None, None)
        assert model.address == ids.data_ptr()


@pytest.fixture
def triton(monkeypatch):
    """As with a GPU; the kernels themselves stay with torch here."""
    monkeypatch.setattr(network_module, "choose_backend", lambda *_: "triton")


def test_a_plain_head_is_fused(triton, caplog):
    model = Model()
    network, said = made(caplog, model)
    assert torch.equal(network.head, model.lm_head.weight)
    assert said == ["ivl: value network small: output projection fused with the weighted add"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_small_biases_and_wide_soft_caps_are_seen_in_every_dtype(triton, dtype, spread):
    def head(**more):
        return network_module._plain_head(Model(spread=spread, **more).to(dtype), ROWS)[0]

    assert torch.equal(head(), Model(spread=spread).lm_head.weight.to(dtype))
    for more in ({"bias": 0.05 * spread}, {"soft_cap": 30.0}, {"scale": 0.9}, {"scale": 0.99}):
        assert head(**more) is None, more


def test_small_logits_that_float16_rounds_are_a_projection_too(triton):
    assert network_module._plain_head(Model(spread=1e-6).to(torch.float16), ROWS)[0] is not None


def test_a_head_of_zeros_is_plain(triton):
    """As `ivl train --zero_output_layer true` starts with."""
    assert network_module._plain_head(Model(spread=0.0), ROWS)[0] is not None


def test_logits_beyond_the_numbers_of_a_dtype_say_nothing(triton):
    assert network_module._plain_head(Model(spread=1e3).to(torch.float16), ROWS)[0] is None


REASONS = {
    "tensor parallel": (lambda: Model(tp_size=2), "split over tensor-parallel ranks"),
    "quantized": (lambda: Model(method=QuantizedMethod()), r"quantized \(QuantizedMethod\)"),
    "bias": (lambda: Model(bias=0.5), "a bias, a scale or a soft cap"),
    "scale": (lambda: Model(scale=0.5), "a bias, a scale or a soft cap"),
    "soft cap": (lambda: Model(soft_cap=5.0), "a bias, a scale or a soft cap"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_other_heads_go_by_the_model_which_the_log_says_once(triton, caplog, monkeypatch, reason):
    make, wanted = REASONS[reason]
    model = make()
    fused = []
    monkeypatch.setattr(network_module, "lm_head_value_add", lambda *args, **kwargs: fused.append(args))
    network, said = made(caplog, model)
    assert network.head is None
    assert not fused
    assert len(said) == 1
    assert re.search(f"by its own compute_logits, as .*{wanted}", said[0])
    logits = torch.zeros(1, ROWS)
    hidden = torch.linspace(-1, 1, WIDTH).view(1, -1)
    network.add_logits(logits, hidden, torch.full((1,), 0.5), None)
    torch.testing.assert_close(logits, 0.5 * model.compute_logits(hidden))


def test_batch_invariance_keeps_to_vllm(triton, caplog, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    network, said = made(caplog, Model())
    assert network.head is None
    assert "VLLM_BATCH_INVARIANT asks for vLLM's own kernels" in said[0]


def test_without_triton(caplog):
    network, said = made(caplog, Model())
    assert network.head is None
    assert "there is no Triton for cpu" in said[0]
