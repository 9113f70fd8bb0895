"""No kernel is compiled after the warm-up: what Triton's launcher asks for, under a driver that has nothing to launch.

Run by `test_steps.py` in a process of its own. A kernel is compiled for the types of its arguments and for what 16
divides among them; here the launcher works that out, and is given a mark in place of the compiled kernel.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ivl_vllm.serving import network, solved_weights
from ivl_vllm.serving.request_weights import Addition
from ivl_vllm.serving.solved_weights import SolvedWeights, warm_up_solvers
from ivl_vllm.serving.value_rows import Rows, ValueRows


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


OF_KERNELS = [
    importlib.import_module(f"ivl_kernels.{name}")  # functions of the package hide some of its modules
    for operation in ("fusion", "value_add", "lm_head_value_add")
    for name in (operation, f"triton_{operation}")
]
WIDTH = 64
OF_BASE = 128  # its hidden states, in front of the networks'


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that had to be compiled so far, by name."""
    found = []

    def keep(self, key, signature, device, *args):
        found.append(self.__name__)
        self.device_caches[device][0][key] = kernel = object()
        return kernel

    driver.set_active(Driver())
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: run(self, *args, **kwargs | {"warmup": True}))
    monkeypatch.setattr(JITFunction, "_do_compile", keep)
    monkeypatch.setattr(solved_weights, "async_tensor_h2d", lambda data, device: torch.as_tensor(data))
    for module in (network, solved_weights, *OF_KERNELS):
        if hasattr(module, "choose_backend"):
            monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
        if hasattr(module, "processor_count"):
            monkeypatch.setattr(module, "processor_count", lambda device: 132)
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
    return found


class Model(nn.Module):
    """As much of a vLLM model as its output projection needs; vLLM pads a vocabulary to a multiple of 64."""

    def __init__(self, columns, is_plain):
        super().__init__()
        self.columns, self.is_plain = columns, is_plain
        self.lm_head = nn.Module()
        padded = torch.randn(-(-columns // 64) * 64, WIDTH, dtype=torch.bfloat16)
        self.lm_head.weight = nn.Parameter(padded, requires_grad=False)
        self.lm_head.quant_method, self.lm_head.tp_size = UnquantizedEmbeddingMethod(), 1

    def compute_logits(self, hidden):
        logits = (hidden @ self.lm_head.weight.t())[:, : self.columns]
        return logits if self.is_plain else torch.tanh(logits)


def make_network(columns, base_columns, is_plain, is_mapped):
    config = SimpleNamespace(
        get_vocab_size=lambda: columns, get_hidden_size=lambda: WIDTH, dtype=torch.bfloat16, model="small"
    )
    made = network.Network(Model(columns, is_plain), config, 8, base_columns)
    if is_mapped:
        partners = torch.zeros(base_columns, dtype=torch.int32)
        made._other = SimpleNamespace(
            columns=partners, partners=partners, mean=False, known=lambda x: x, with_mean=lambda x: x
        )
    return made


@pytest.mark.parametrize(
    "base_columns, columns, pairs, is_plain, is_mapped, is_wide, most, rows",
    [
        (50_257, 50_257, 2, True, False, False, 64, (1, 2, 3, 5, 8, 40)),
        (50_257, 50_257, 1, True, False, True, 64, (1, 3, 40)),  # the base's logits are fp32 as they come
        (50_257, 50_257, 1, False, False, True, 64, (1, 3, 40)),
        (32_001, 32_000, 1, True, False, False, 256, (1, 3, 200)),  # 16 divides the one and not the other
        (151_936, 32_000, 2, True, True, False, 64, (1, 3, 28, 29, 40)),  # larger tiles from 29 rows on
        (151_936, 151_936, 1, False, False, False, 64, (1, 3, 40)),
    ],
)
def test_nothing_is_compiled_after_the_warm_up(
    compiled, base_columns, columns, pairs, is_plain, is_mapped, is_wide, most, rows
):
    value_rows = ValueRows()
    value_rows.networks = [make_network(columns, base_columns, is_plain, is_mapped) for _ in range(2 * pairs)]
    value_rows.groups = [tuple(range(2 * pairs))]
    values = {
        f"pair{n}": SimpleNamespace(minus=True, signed_networks=[(2 * n, 1), (2 * n + 1, -1)]) for n in range(pairs)
    }
    settings = SimpleNamespace(networks=list(range(2 * pairs)), max_weight=2.0, values=values)
    for one in value_rows.networks:
        one.warm_up(most)
    warm_up_solvers(settings, value_rows, base_columns, nn.Linear(1, 1), most)
    assert {"value_add_kernel", "fusion_kernel"} <= set(compiled)
    assert ("lm_head_value_add_kernel" in compiled) == is_plain
    compiled.clear()

    solved = SolvedWeights(settings, value_rows, most, torch.device("cpu"))
    dtype = torch.float32 if is_wide else torch.bfloat16
    for count in rows:
        for row_index in (None, torch.arange(count)):
            # As a step has them: without the base's padding, converted where they are not fp32; joined hidden states.
            total = count if row_index is None else count + 1
            logits = torch.zeros(total, -(-base_columns // 64) * 64, dtype=dtype)[:, :base_columns].float()
            joined = torch.zeros(total, OF_BASE + WIDTH * 2 * pairs, dtype=torch.bfloat16)
            of_all = Rows(joined[:, OF_BASE:].split(WIDTH, dim=-1))
            own = of_all if row_index is None else of_all.at(row_index)
            for members in (tuple(range(2 * pairs)), (0,)):
                weights = torch.ones(len(members), count)
                value_rows.add(logits, of_all, [Addition(members, row_index, weights)])
            bounds = torch.ones(count, 2 * pairs + 1)
            solved._bound(logits, own, row_index, torch.ones(count), bounds, list(range(2 * pairs)))
            for names in {tuple(values), tuple(values)[:1]}:
                solved.fuse(logits, own, row_index, torch.ones(count), names)
            assert not compiled, (count, row_index is None, compiled)


def test_weights_may_begin_anywhere(compiled):
    """What a graph is captured with may not compile a kernel."""
    value_add, lm_head_value_add = (OF_KERNELS[n] for n in (2, 4))
    logits, value = torch.zeros(4, 1000), torch.zeros(4, 1000, dtype=torch.bfloat16)
    hidden, matrix = torch.zeros(4, WIDTH, dtype=torch.bfloat16), torch.zeros(1000, WIDTH, dtype=torch.bfloat16)
    weights = torch.ones(8)
    for start in (0, 1):
        own = weights[start : start + 4]
        value_add.value_add(logits, value, own)
        lm_head_value_add.lm_head_value_add(logits, hidden, matrix, own)
        OF_KERNELS[0].trust_region_weights(logits, value, own, own)
    assert sorted(compiled) == ["fusion_kernel", "lm_head_value_add_kernel", "value_add_kernel"]
