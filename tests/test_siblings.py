"""Networks that are LoRA siblings hold equal matrices once and are projected once; others do neither."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from own_process import ON_V2, assert_all_pass
from parity import Reference, Request, assert_parity, engine, mismatches, random_requests, run
from safetensors.torch import load_file, save_file
from sibling_models import SOLVED, make_family, value_rows
from solved_reference import SolvedReference, solved_requests
from torch import nn

import ivl_vllm
from ivl_vllm.settings import NetworkSource, parse_settings

HERE = Path(__file__).parent


@pytest.fixture
def projections(monkeypatch):
    """The numbers of rows of each projection of value networks."""
    from ivl_vllm.serving import network

    counts, project, fused = [], network.Network.value_logits, network.lm_head_value_add

    def projects(self, hidden):
        counts.append(len(hidden))
        return project(self, hidden)

    def projects_and_adds(logits, hidden, *args, **kwargs):  # on a GPU
        counts.append(len(hidden))
        return fused(logits, hidden, *args, **kwargs)

    monkeypatch.setattr(network.Network, "value_logits", projects)
    monkeypatch.setattr(network, "lm_head_value_add", projects_and_adds)
    return counts


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # qwen2 ties its embeddings
def test_siblings_share_tables_and_one_projection(models, tmp_path, projections, kind):
    values, folders = make_family(models, tmp_path, kind)
    requests = random_requests(40, seed=65, names=("one", "two", "other"))
    with engine(models["base"], **ivl_vllm.engine_args(values=values), max_num_batched_tokens=48) as llm:
        rows = value_rows(llm)
        # The small base of both pairs is there once.
        assert len(rows.networks) == 4
        assert rows.groups == [(0, 1, 2), (3,)]
        one, small, two, other = (network.model for network in rows.networks)
        assert one.lm_head is small.lm_head is two.lm_head and one.lm_head is not other.lm_head
        assert one.model.embed_tokens is small.model.embed_tokens is two.model.embed_tokens
        assert one.model.layers[0].mlp is not small.model.layers[0].mlp
        outputs = run(llm, requests)

        before, pair_requests = len(projections), random_requests(6, seed=66, names=("one", "two"), last_arrival=1)
        for request in pair_requests:
            request.weights, request.ivl = {"one": 1.0, "two": -0.5}, {"one": 1.0, "two": -0.5}
            request.params["max_tokens"] = 8
        steps = []
        put = rows.put
        rows.put = lambda hidden, count: steps.append(count) or put(hidden, count)
        pair_outputs = run(llm, pair_requests)
        assert 8 <= len(projections) - before <= len(steps)  # three networks, one projection a step
    reference = Reference(models["base"], **folders)
    assert_parity(reference, requests, outputs)
    assert_parity(reference, pair_requests, pair_outputs)


def test_siblings_are_projected_together_where_weights_are_solved(models, tmp_path, projections):
    """Each with its own logits for `auto`, added up for `max_kl` and for the default weight of prompt logprobs."""
    values, folders = make_family(models, tmp_path)
    reference = SolvedReference(models["base"], **folders)
    requests = solved_requests(36, seed=69, kinds=SOLVED)
    with engine(
        models["base"], **ivl_vllm.engine_args(values=values, default_weight=1.0), max_num_batched_tokens=48
    ) as llm:
        rows = value_rows(llm)
        assert rows.groups == [(0, 1, 2), (3,)]
        outputs = run(llm, requests)
        steps = []
        put = rows.put
        rows.put = lambda hidden, count: steps.append(count) or put(hidden, count)
        for kind, stacked in zip(SOLVED[:2], (3, 1), strict=True):
            alike = solved_requests(4, seed=70, kinds=[kind], spread=1)
            for request in alike:
                request.params["max_tokens"] = 6
            projections.clear(), steps.clear()
            assert_parity(reference, alike, run(llm, alike))
            # Prompts in chunks: a step may have no row to sample from.
            assert projections == [count * stacked for count in steps if count], kind
        prompt = requests[0].prompt * 2
        projections.clear()
        (output,) = run(llm, [Request(prompt, {}, 0, {"max_tokens": 1, "prompt_logprobs": 1})])
        assert sum(projections) == len(prompt) - 1  # in chunks; expert and small base at once
    expected = reference.logits(prompt, {"one": 1.0}).log_softmax(-1)
    alone = reference.logits(prompt, {}).log_softmax(-1)
    asked = range(len(prompt) - 1), prompt[1:]
    found = torch.tensor([chosen[token].logprob for chosen, token in zip(output.prompt_logprobs[1:], prompt[1:])])
    torch.testing.assert_close(found, expected[asked], rtol=0, atol=1e-3)
    assert (found - alone[asked]).abs().max() > 0.1
    assert_parity(reference, requests, outputs)
    fixed = [Request(r.prompt, {name: 1.0 for name in r.weights if name != "max_kl"}, r.ivl) for r in requests]
    wrong = mismatches(reference, fixed, outputs)
    assert any("{'one': 1.0, 'two': 1.0}" in line for line in wrong), wrong


def test_an_output_layer_that_differs_in_one_number_is_not_shared(models, tmp_path):
    values, folders = make_family(models, tmp_path)
    values.pop("two"), folders.pop("two")
    file = folders["one"][0] / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][7, 3] += 1e-3
    save_file(weights, file, {"format": "pt"})
    requests = random_requests(12, seed=68, names=("one", "other"), last_arrival=6)
    with engine(models["base"], **ivl_vllm.engine_args(values=values)) as llm:
        rows = value_rows(llm)
        assert rows.groups == [(0,), (1,), (2,)]
        one, small, _ = (network.model for network in rows.networks)
        assert one.model.embed_tokens is small.model.embed_tokens and one.lm_head is not small.lm_head
        outputs = run(llm, requests)
    assert_parity(Reference(models["base"], **folders), requests, outputs)


def test_model_runner_v2():
    assert_all_pass("sibling_cases.py", 2, ON_V2)


def test_one_folder_is_one_network_whatever_way_it_is_named(tmp_path, monkeypatch):
    for name in ("expert", "second", "small"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    spelled = ["small", "./expert/../small/", str(tmp_path / "link")]
    values = {str(n): {"model": "expert", "minus": path} for n, path in zip("abc", spelled, strict=True)}
    settings = parse_settings({"values": values}, {})
    assert [Path(source.model).name for source in settings.networks] == ["expert", "small"]
    (tmp_path / "gpt2").touch()
    hub = parse_settings({"values": {"a": {"model": "gpt2", "minus": "some/model"}}}, {})  # ids, not folders
    assert hub.networks == (NetworkSource("gpt2"), NetworkSource("some/model"))


@pytest.mark.parametrize("place", [(0, 0), (7, 7)])
def test_equal_matrices_share_memory_and_others_do_not(monkeypatch, place):
    """Compared in pieces, of which the first or the last may be the one that differs."""
    from ivl_vllm.serving import shared_weights
    from ivl_vllm.serving.shared_weights import share_equal_weights

    monkeypatch.setattr(shared_weights, "CHUNK", 16)

    def make(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), nn.Embedding(6, 8))

    other, model = make(0), make(0)
    with torch.no_grad():
        model[1].weight[place] += 1
    saved = share_equal_weights(model, [other])
    assert saved == 4 * (8 * 8 + 6 * 8)
    assert model[0].weight.data_ptr() == other[0].weight.data_ptr()
    assert model[2].weight.data_ptr() == other[2].weight.data_ptr()
    assert model[1].weight.data_ptr() != other[1].weight.data_ptr()
    assert model[0].bias.data_ptr() != other[0].bias.data_ptr()
    assert share_equal_weights(model, [other]) == 0  # nothing is counted twice
    assert share_equal_weights(make(1), [other]) == 0


class FakeNetwork:
    """`function` of the logits that a head gives."""

    head = None

    def __init__(self, lm_head, function):
        self.model = SimpleNamespace(lm_head=lm_head)
        self._function = function

    def no_hidden(self, rows):
        return torch.zeros(rows, 64, dtype=self.model.lm_head.weight.dtype)

    def value_logits(self, hidden):
        return self._function(self.model.lm_head(hidden))


@pytest.mark.parametrize(
    "one, other, maps, together",
    [
        (lambda x: x, lambda x: x, (None, None), True),
        (lambda x: x / 8, lambda x: x / 8, (None, None), True),
        (lambda x: x, lambda x: x, ("a", "a"), True),
        (lambda x: x, lambda x: x, (None, "a"), False),
        (lambda x: x, lambda x: x / 8, (None, None), False),
        (lambda x: x + 1, lambda x: x + 1, (None, None), False),
        (lambda x: 300 * (x / 300).tanh(), lambda x: 300 * (x / 300).tanh(), (None, None), False),
    ],
    ids=["plain", "scaled", "one_map", "two_maps", "two_scales", "bias", "soft_cap"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_projected_together(monkeypatch, one, other, maps, together, dtype):
    from ivl_vllm.serving import shared_weights

    monkeypatch.setattr(shared_weights, "get_tensor_model_parallel_world_size", lambda: 1)
    torch.manual_seed(0)
    head, another = (nn.Linear(64, 50, bias=False, dtype=dtype) for _ in range(2))
    networks = [FakeNetwork(head, one), FakeNetwork(another, one), FakeNetwork(head, other)]
    sources = [NetworkSource("x", maps[0]), NetworkSource("y", maps[0]), NetworkSource("z", maps[1])]
    expected = [(0, 2), (1,)] if together else [(0,), (1,), (2,)]
    assert shared_weights.projection_groups(networks, sources) == expected


def test_sums_of_hidden_states():
    """Rows and networks without a weight take no part, even where their hidden states are no numbers."""
    from ivl_vllm.serving.request_weights import RequestWeights

    weights = RequestWeights(5, 4, torch.device("cpu"))
    wanted = {0: [1.0, -1.0, 0.0, 0.0], 2: [0.5, -2.5, 2.0, 1.0], 3: [0.0, 0.0, 0.0, 3.0]}
    for slot, of_slot in wanted.items():
        weights.set(slot, of_slot)
    weights.flush()
    hidden = [torch.randn(4, 6) for _ in range(4)]
    slots, groups = torch.tensor([3, 2, 1, 0]).numpy(), [(0, 1, 2), (3,)]
    hidden[2][3] = float("nan")  # the request of this row has no weight for this network
    hidden[0][2] = float("inf")
    expected = torch.zeros(4, 6)
    expected[1] = 0.5 * hidden[0][1] - 2.5 * hidden[1][1] + 2.0 * hidden[2][1]
    expected[3] = hidden[0][3] - hidden[1][3]

    together, alone = weights.of_rows(slots, groups)
    assert together.networks == (0, 1, 2) and alone.networks == (3,)
    rows, scale = together.summed(hidden)
    assert together.row_index.tolist() == [1, 3] and scale.tolist() == [2.5, 1.0]
    torch.testing.assert_close(scale[:, None] * rows, expected[[1, 3]])
    rows, scale = alone.summed(hidden)
    assert alone.row_index.tolist() == [0, 1] and scale.tolist() == [3.0, 1.0]
    assert torch.equal(rows, hidden[3][:2])

    together, alone = weights.of_slots(torch.from_numpy(slots), slots, groups)
    rows, scale = together.summed(hidden)
    assert together.row_index is None and scale.tolist() == [0.0, 2.5, 0.0, 1.0]
    torch.testing.assert_close(scale[:, None] * rows, expected)
    # Networks that no running request uses may have sat the step out.
    only = weights.of_rows(torch.tensor([0, 1]).numpy(), groups)
    assert [addition.networks for addition in only] == [(0, 1)]
    rows, _ = only[0].summed([hidden[0], hidden[1], None, None])
    torch.testing.assert_close(rows, (hidden[0] - hidden[1])[[0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_does_not_notice_which_siblings_others_use(dtype):
    """In half precision either: neither rounded more once a sibling joins, nor beyond the largest number."""
    from ivl_vllm.serving.request_weights import RequestWeights

    weights = RequestWeights(2, 2, torch.device("cpu"))
    weights.set(0, [9.7, 0.0])
    weights.flush()
    hidden = [torch.randn(2, 64).to(dtype) * 7000 for _ in range(2)]
    groups = [(0, 1)]
    alone = weights.of_rows(torch.tensor([0, 1]).numpy(), groups)[0].summed(hidden)
    weights.set(1, [1.0, -1.0])
    weights.flush()
    rows, scale = weights.of_rows(torch.tensor([0, 1]).numpy(), groups)[0].summed(hidden)
    assert torch.equal(rows[0], alone[0][0]) and scale[0] == alone[1][0]
    assert rows.isfinite().all()
    assert torch.equal(rows[1], (hidden[0][1].float() - hidden[1][1].float()).to(dtype))
