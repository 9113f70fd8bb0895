"""The joined forward on its own: what a GPU with CUDA graphs in pieces needs, shown on the CPU."""

import copy
import json
import shutil
from types import SimpleNamespace

import torch
from parity import create
from torch import nn

from ivl_vllm.serving.joined_model import join, release
from ivl_vllm.serving.network import StableInput
from ivl_vllm.serving.value_rows import ValueRows

SCRATCH = torch.zeros(64, 8)


class Base(nn.Module):
    """Leaves its output in memory that the next model uses, as the last graph of a model does."""

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        return SCRATCH[: len(input_ids), :4].copy_(input_ids[:, None].expand(-1, 4))

    def compute_logits(self, hidden):
        assert hidden.is_contiguous()
        return hidden * 2


class FakeNetwork:
    model = torch.nn.Module()

    def __init__(self, number: int):
        self.number = number

    def forward(self, input_ids, positions, base_hidden, base_logits):
        SCRATCH.fill_(-1.0)
        assert (
            base_logits(base_hidden.contiguous()) == 2 * input_ids[:, None]
        ).all()  # a cascade still reads the base's own
        dtype = torch.float32 if self.number == 1 else torch.bfloat16
        return SCRATCH[: len(input_ids), :3].copy_(input_ids[:, None] * 10 + self.number).to(dtype)


def no_steps(*networks):
    """As `Steps` outside of steps."""
    rows = ValueRows()
    rows.networks = list(networks)
    return SimpleNamespace(
        needed=None,
        sampled=False,
        rows=rows,
        text_positions=lambda positions: positions,
        token_ids=lambda input_ids, positions: input_ids,
    )


def make_joined(default_weights=(0.0, 0.0)):
    steps = no_steps(FakeNetwork(1), FakeNetwork(2))
    return join(Base(), steps, default_weights), steps.rows, steps


def test_no_model_overwrites_what_another_left():
    model, rows, _ = make_joined()
    for ids in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])):  # the first forward, and a later one
        joined = model(ids, torch.arange(len(ids)))
        logits = model.compute_logits(joined)
        assert torch.equal(logits, 2 * ids[:, None].expand(-1, 4))
        first, second = rows.take(len(ids))
        assert torch.equal(first, (10 * ids + 1)[:, None].expand(-1, 3)) and first.dtype == torch.float32
        assert torch.equal(second, (10 * ids + 2)[:, None].expand(-1, 3).bfloat16()) and second.dtype == torch.bfloat16


def test_bases_that_take_the_rest_by_name_alone_or_not_at_all():
    class ByName(Base):
        def forward(self, input_ids, positions, *, intermediate_tensors=None, inputs_embeds=None):
            return super().forward(input_ids, positions)

    class Neither(Base):
        def forward(self, input_ids, positions):
            return super().forward(input_ids, positions)

    ids = torch.tensor([1.0, 2.0])
    for base in (ByName(), Neither()):
        joined = join(base, no_steps(FakeNetwork(1)), (0.0,))
        # As vLLM calls it.
        assert joined(input_ids=ids, positions=ids, intermediate_tensors=None, inputs_embeds=None).shape[1] == 4 + 3


def test_a_base_is_given_embeddings_or_token_ids():
    """vLLM hands a multimodal base both, as the joined model asks for; it gets what its own class asks for."""

    class Sees(nn.Module):
        def forward(self, input_ids, positions, inputs_embeds=None):
            self.given = (input_ids is not None, inputs_embeds is not None)
            return torch.zeros(2, 4)

        def compute_logits(self, hidden):
            return 2.0 * torch.tensor([[1.0], [2.0]])

    class SeesAndReads(Sees):
        requires_raw_input_tokens = True

    ids = torch.tensor([1.0, 2.0])
    for base, with_embeds in ((Sees(), (False, True)), (SeesAndReads(), (True, True))):
        model = join(base, no_steps(FakeNetwork(1)), (0.0,))
        assert model.requires_raw_input_tokens
        for embeds, given in ((torch.zeros(2, 4), with_embeds), (None, (True, False))):
            assert torch.equal(model(ids, ids, inputs_embeds=embeds)[:, 4], 10 * ids + 1) and model.given == given


def test_a_base_that_is_compiled_as_a_whole_runs_the_joined_forward():
    """Its own forward was bound for the compiler before; a class like Ernie 4.5's."""

    class Compiled(Base):
        def __init__(self):
            super().__init__()
            self.do_not_compile, self.bound = False, self.forward

        def __call__(self, *args):
            return self.forward(*args) if self.do_not_compile else self.bound(*args)

    ids = torch.tensor([1.0, 2.0])
    model = Compiled()
    assert model(ids, ids).shape[1] == 4
    join(model, no_steps(FakeNetwork(1)), (0.0,))
    assert model(ids, ids).shape[1] == 4 + 3


def test_drafters_get_what_the_base_has_for_them_or_its_hidden_states():
    held = StableInput(4)
    held.hold(torch.ones(2, 3))
    steps = no_steps()

    class Plain(nn.Module):
        pass

    class Own(nn.Module):
        residual = None

        def get_mtp_target_hidden_states(self):
            return self.residual

    plain, own, without = (
        join(base, steps, (), for_drafter) for base, for_drafter in ((Plain(), held), (Own(), held), (Plain(), None))
    )
    assert plain.get_mtp_target_hidden_states() is held.buffer
    assert own.get_mtp_target_hidden_states() is held.buffer  # it has none for this drafter
    own.residual = torch.zeros(4, 6)
    assert own.get_mtp_target_hidden_states() is own.residual
    assert not hasattr(without, "get_mtp_target_hidden_states")  # vLLM 0.31 would cut what it gives


def test_layers_that_a_quantized_checkpoint_leaves_as_they_are(models, tmp_path):
    """They are listed by the names that they have in the checkpoint."""
    from vllm.config import LoadConfig, ModelConfig
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    from ivl_vllm.serving.loader import quantization

    folder = shutil.copytree(models["value"], tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "modules_to_not_convert": ["model.layers.0.mlp.down_proj"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    found = quantization(ModelConfig(str(folder), dtype="bfloat16"), LoadConfig(), "ivl_0")
    layer = LinearBase.__new__(LinearBase)
    kept = found.get_quant_method(layer, prefix="ivl_0.model.layers.0.mlp.down_proj")
    assert isinstance(kept, UnquantizedLinearMethod)
    assert quantization(ModelConfig(str(models["value"])), LoadConfig(), "ivl_0") is None


def test_attention_is_set_up_for_the_networks_own_architecture(models, monkeypatch):
    """As vLLM does for Gemma 4, whose wide heads some kernels cannot take; the engine's settings stay the base's."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ivl_vllm.serving.loader import use_attention_of_model

    class Hook:
        @staticmethod
        def verify_and_update_config(config):
            config.attention_config.flash_attn_version = 4
            config.cache_config.block_size = 4096
            config.compilation_config.max_cudagraph_capture_size = 4096

    engine = create(models["base"])
    own = copy.copy(engine)
    use_attention_of_model(own)  # nothing is known of this architecture
    assert own.attention_config is engine.attention_config
    monkeypatch.setitem(MODELS_CONFIG_MAP, engine.model_config.architecture, Hook)
    use_attention_of_model(own)
    assert own.attention_config.flash_attn_version == 4 and engine.attention_config.flash_attn_version is None
    assert own.compilation_config is engine.compilation_config and own.cache_config is engine.cache_config
    assert engine.cache_config.block_size != 4096 != engine.compilation_config.max_cudagraph_capture_size


def test_value_networks_are_not_offloaded():
    from vllm.model_executor.offloader import NoopOffloader, get_offloader, set_offloader

    from ivl_vllm.serving.loader import _kept_on_device

    before, of_base = get_offloader(), NoopOffloader()
    set_offloader(of_base)
    try:
        with _kept_on_device():
            assert isinstance(get_offloader(), NoopOffloader) and get_offloader() is not of_base
        assert get_offloader() is of_base
    finally:
        set_offloader(before)


def test_networks_that_a_step_does_not_need_sit_it_out():
    model, rows, steps = make_joined()
    ids = torch.tensor([1.0, 2.0, 3.0])
    assert model(ids, ids).shape[1] == 4 + 3 + 3  # outside of steps: all
    for needed, width in (({1}, 4 + 3), ({0, 1}, 4 + 3 + 3), (set(), 4)):
        steps.needed = frozenset(needed)
        joined = model(ids, ids)
        assert joined.shape[1] == width
        assert torch.equal(model.compute_logits(joined), 2 * ids[:, None].expand(-1, 4))
        first, second = rows.take(3)
        assert (first is not None) == (0 in needed) and (second is not None) == (1 in needed)
        if second is not None:
            assert torch.equal(second, (10 * ids + 2)[:, None].expand(-1, 3).bfloat16())


def test_a_replayed_graph_has_all_networks():
    model, rows, steps = make_joined()
    ids = torch.tensor([1.0, 2.0])
    captured = model(ids, ids)
    steps.needed, steps.sampled = frozenset(), False
    model(ids, ids)
    steps.sampled = False
    model.compute_logits(captured)
    assert all(hidden is not None for hidden in rows.take(2))


def test_rows_are_handed_out_once_and_in_order():
    rows = ValueRows()
    rows.put([torch.arange(6)[:, None], None], 6)
    assert rows.take(2)[0].flatten().tolist() == [0, 1]
    assert rows.take(3)[0].flatten().tolist() == [2, 3, 4]
    try:
        rows.take(2)
    except RuntimeError as error:
        assert "2 rows of logits after 5, but 6 rows" in str(error)
    else:
        raise AssertionError("seven rows out of six")


def test_inputs_stay_where_a_graph_was_captured():
    stable = StableInput(16)
    first = stable.hold(torch.arange(16).int())
    second = stable.hold(torch.tensor([7, 8]).int())
    assert first.data_ptr() == second.data_ptr() and second.tolist() == [7, 8]
    assert StableInput(4).hold(torch.zeros(9, 3)).shape == (9, 3)


def test_a_base_that_is_gone_takes_its_own_networks_along_and_no_others():
    rows, networks = ValueRows(), [FakeNetwork(1)]
    rows.networks = networks
    release(rows, [FakeNetwork(2)])
    assert rows.networks is networks
    release(rows, networks)
    assert rows.networks == []
