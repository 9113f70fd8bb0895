"""Model runner V2 in Triton's interpreter. `test_parity_v2.py` runs this file in a process of its own."""

import json
import random

import pytest
from cascade_models import mark_scheme
from parity import Reference, Request, add_images, assert_parity, engine, metric, random_requests, run
from solved_reference import SolvedReference, solved_requests
from tiny import make_model
from vocab_map_models import VALUE_VOCAB, make_other, random_map

import ivl_vllm
from ivl_vllm.trace_view import read_trace


def test_random_mixes_chunked_prefill_and_prefix_cache(models):
    """Two values, one of them a `minus` pair; then logprobs, structured output and an abort on the same engine."""
    values = {
        "math": {"model": str(models["value"])},
        "style": {"model": str(models["sliding"]), "minus": str(models["anti"])},
    }
    reference = Reference(models["base"], math=models["value"], style=(models["sliding"], models["anti"]))
    with engine(
        models["base"],
        **ivl_vllm.engine_args(values=values, default_weight=0.5),
        max_num_batched_tokens=32,
        logprobs_mode="processed_logprobs",
        structured_outputs_config={"disable_any_whitespace": True, "backend": "xgrammar"},
    ) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        assert all(network.head is not None for network in networks_of(llm))  # projected by the fused kernel
        requests = random_requests(48, seed=1, names=("math", "style"))
        for number, request in enumerate(requests):
            request.weights = request.weights if request.ivl is not ... else {"math": 0.5}
            request.aborts = 4 if number % 12 == 5 else None
            request.params["max_tokens"] = min(10, request.params["max_tokens"])
        outputs = run(llm, requests)
        assert_parity(reference, requests, outputs)
        assert 0 < sum(o is None for o in outputs) <= 4
        done = [(r, o) for r, o in zip(requests, outputs) if o is not None]
        assert any(len(r.prompt) - o.num_cached_tokens > 32 for r, o in done)
        assert sum(o.num_cached_tokens for _, o in done) > 0

        asked = Request(requests[0].prompt, {"style": 1.0}, {"style": 1.0}, {"logprobs": 3, "max_tokens": 4})
        (output,) = run(llm, [asked])
        tokens = list(output.outputs[0].token_ids)
        expected = reference.logits([*asked.prompt, *tokens], asked.weights)[len(asked.prompt) - 1 : -1].log_softmax(-1)
        for position, chosen in enumerate(output.outputs[0].logprobs):
            for token, logprob in chosen.items():
                assert abs(logprob.logprob - expected[position, token].item()) < 1e-3

        from vllm.sampling_params import StructuredOutputsParams

        schema = {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        }
        guided = Request(
            [5, 6, 7],
            {},
            {"math": 10.0},
            {
                "structured_outputs": StructuredOutputsParams(json=schema),
                "ignore_eos": False,
                "detokenize": True,
                "max_tokens": 30,
            },
        )
        assert isinstance(json.loads(run(llm, [guided])[0].outputs[0].text)["ok"], bool)


def networks_of(llm):
    """The loaded value networks, straight from the worker's model."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.model._ivl.rows.networks


def test_a_head_that_scales_its_logits_is_not_fused(models, tmp_path):
    value = make_model(tmp_path / "value", "granite", seed=9)
    with engine(models["base"], **ivl_vllm.engine_args(value_model=str(value))) as llm:
        assert networks_of(llm)[0].head is None
        requests = random_requests(8, seed=29, last_arrival=2)
        for request in requests:
            request.params["max_tokens"] = min(8, request.params["max_tokens"])
        outputs = run(llm, requests)
    assert_parity(Reference(models["base"], default=value), requests, outputs)


def test_another_vocabulary(models, tmp_path):
    """The map inside the fused kernel, with the mean of the value row as a further row of the matrix."""
    other = make_other(tmp_path / "other")
    maps = {
        "one": random_map(models["base"], other, 1, pieces_at_most=1),
        "mean": random_map(models["base"], other, 2, unmapped=VALUE_VOCAB),
    }
    values = {}
    for name, vocab_map in maps.items():
        vocab_map.save(tmp_path / f"{name}.safetensors")
        values[name] = {"model": str(other), "vocab_map": str(tmp_path / f"{name}.safetensors")}
    with engine(models["base"], **ivl_vllm.engine_args(values=values), max_num_batched_tokens=32) as llm:
        assert all(network.head is not None for network in networks_of(llm))
        requests = random_requests(12, seed=62, names=("one", "mean"), longest=40, last_arrival=10)
        for request in requests:
            request.params["max_tokens"] = min(8, request.params["max_tokens"])
        outputs = run(llm, requests)
    assert_parity(Reference(models["base"], maps=maps, one=other, mean=other), requests, outputs)


def test_steps_without_steered_requests(models, monkeypatch):
    """Value networks sit out steps; long prefixes in common; prompt log-probabilities under a default weight."""
    from ivl_vllm.serving.joined_model import _Join

    ran = []
    choose = _Join.choose
    monkeypatch.setattr(_Join, "choose", lambda self: ran.append(len(choose(self))) or self.active)
    reference = Reference(models["base"], default=models["value"])
    with engine(
        models["base"],
        **ivl_vllm.engine_args(value_model=str(models["value"]), default_weight=0.5),
        max_num_batched_tokens=32,
    ) as llm:
        prefix = list(range(10, 80))
        requests = []
        for number in range(12):
            weight = (0.0, 1.0, 0.0, -1.0)[number % 4]
            ask = {"default": weight} if weight else 0
            requests.append(Request([*prefix, 5 + number], {"default": weight}, ask, {"max_tokens": 5}, 5 * number))
        ran.clear()
        outputs = run(llm, requests)
        assert_parity(reference, requests, outputs)
        assert 0 < sum(ran) < 0.9 * len(ran)
        for steered in (False, True):
            alike = [o for r, o in zip(requests, outputs) if any(r.weights.values()) is steered]
            assert sum(o.num_cached_tokens for o in alike) > 0
        asked = Request(prefix, {}, 0, {"max_tokens": 2, "prompt_logprobs": 1})
        (output,) = run(llm, [asked])
        expected = reference.logits(prefix, {"default": 0.5}).log_softmax(-1)
        for position, of_token in enumerate(output.prompt_logprobs[1:]):
            for token, logprob in of_token.items():
                assert abs(logprob.logprob - expected[position, token].item()) < 1e-3


def test_cascade_value_networks(models, tmp_path):
    folders = {
        "cascade": mark_scheme(make_model(tmp_path / "cascade", "qwen2", seed=11), "cascade"),
        "text": mark_scheme(make_model(tmp_path / "text", seed=12), "cascade+text"),
    }
    values = {name: {"model": str(folder)} for name, folder in folders.items()}
    with engine(models["base"], **ivl_vllm.engine_args(values=values), max_num_batched_tokens=32) as llm:
        requests = random_requests(12, seed=51, names=("cascade", "text"), last_arrival=4)
        for request in requests:
            request.params["max_tokens"] = min(8, request.params["max_tokens"])
        outputs = run(llm, requests)
    schemes = {"cascade": "cascade", "text": "cascade+text"}
    assert_parity(Reference(models["base"], schemes, **folders), requests, outputs)


def test_preemption(models):
    with engine(
        models["base"],
        **ivl_vllm.engine_args(value_model=str(models["value"])),
        num_gpu_blocks_override=10,
        disable_log_stats=False,
        enable_prefix_caching=False,
    ) as llm:
        requests = random_requests(12, seed=19, last_arrival=3)
        for request in requests:
            request.params["max_tokens"] = 36
        outputs = run(llm, requests)
        assert metric(llm, "vllm:num_preemptions") > 0
    assert_parity(Reference(models["base"], default=models["value"]), requests, outputs)


def test_layers_with_a_state(tmp_path):
    """Mamba layers in the base and in the value network, whose states are larger; prefixes are kept and found."""
    base = make_model(tmp_path / "base", "hybrid", seed=21)
    value = make_model(tmp_path / "value", "hybrid", seed=22, hidden=128, heads=4)
    requests = random_requests(10, seed=31, longest=120, last_arrival=4)
    prompt = [token for request in requests for token in request.prompt][:135]
    for number, weight in enumerate([1.0, 0.5]):
        requests.append(Request(prompt, {"default": weight}, weight, {"max_tokens": 5}, arrives=60 + 20 * number))
    with engine(base, **ivl_vllm.engine_args(value_model=str(value)), max_num_batched_tokens=64) as llm:
        outputs = run(llm, requests)
    assert_parity(Reference(base, default=value), requests, outputs)
    assert outputs[-1].num_cached_tokens == 128


def test_images(models, tmp_path):
    base = make_model(tmp_path / "base", "multimodal", seed=24)
    requests = random_requests(12, seed=33, last_arrival=8)
    add_images(requests)
    for request in requests:
        request.params["max_tokens"] = 4
    with engine(base, **ivl_vllm.engine_args(value_model=str(models["value"])), max_num_batched_tokens=32) as llm:
        outputs = run(llm, requests)
    assert_parity(Reference(base, default=models["value"]), requests, outputs)


@pytest.mark.parametrize("drafts", [True, False])
def test_solved_weights(models, tmp_path, monkeypatch, drafts):
    """Every row has its own weight, draft rows too, whose requests only the device knows."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    monkeypatch.setattr(rejection_sampler, "get_max_chunk_logits", lambda vocab_size: 7)
    speculation = {}
    if drafts:
        draft = make_model(tmp_path / "draft", seed=1, hidden=128, layers=3, heads=4, kv_heads=2)
        speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    values = {
        "math": {"model": str(models["value"])},
        "style": {"model": str(models["sliding"]), "minus": str(models["anti"])},
        "prose": {"model": str(models["value"]), "minus": str(models["anti"])},
    }
    kinds = [
        ({}, 0),
        ({"style": "auto"}, "auto:style"),
        ({"math": 1.0}, 1.0),
        ({"math": 1.0, "style": 1.0, "max_kl": 0.5}, "math=1.0,style=1.0;max_kl=0.5"),
        ({"style": "auto", "prose": "auto"}, "auto:style,prose"),
    ]
    path = tmp_path / "trace.jsonl"
    with engine(
        models["base"],
        **ivl_vllm.engine_args(values=values, trace_file=str(path)),
        **({"speculative_config": speculation} if drafts else {}),
        max_num_batched_tokens=48,
        disable_log_stats=False,
    ) as llm:
        requests = solved_requests(15, 82, kinds, spread=8)
        for request in requests:
            request.params["max_tokens"] = min(10, request.params["max_tokens"])
        for number in (1, 3, 4):
            requests[number].ivl += f";trace={number}"
        # A single column is left, which no weight changes: its weight is 0 among rows of other kinds.
        requests[1].params["allowed_token_ids"] = [50]
        requests[1].weights = {}
        outputs = run(llm, requests)
        if drafts:
            assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    pairs = {"style": (models["sliding"], models["anti"]), "prose": (models["value"], models["anti"])}
    reference = SolvedReference(models["base"], math=models["value"], **pairs)
    only = requests.pop(1), outputs.pop(1)
    assert set(only[1].outputs[0].token_ids) == {50}
    assert_parity(reference, requests, outputs)
    traces = read_trace(str(path))
    for name, place in (("3", 2), ("4", 3)):
        tokens = list(outputs[place].outputs[0].token_ids)
        assert [token.token for token in traces[name][: len(tokens)]] == tokens
        alone = reference.greedy(requests[place].prompt, tokens, {})
        assert [token.base_token for token in traces[name][: len(tokens)]] == alone
    assert all(0 < token.weights["math"] <= 1.0 and token.kl < 0.501 for token in traces["3"])
    assert all(set(token.weights) == {"style", "prose"} for token in traces["4"])
    assert all(token.weights == {"style": 0.0} and token.kl == 0.0 for token in traces["1"])


def test_speculative_decoding_with_ngrams(models):
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(
        models["base"],
        **ivl_vllm.engine_args(value_model=str(models["value"])),
        speculative_config=speculation,
        disable_log_stats=False,
    ) as llm:
        # Prompts that repeat themselves give the drafter something to find.
        rng = random.Random(61)
        requests = random_requests(12, seed=59, last_arrival=4)
        for request in requests:
            request.prompt = [rng.randrange(4, 320) for _ in range(4)] * 5
            request.params["max_tokens"] = min(10, request.params["max_tokens"])
        outputs = run(llm, requests)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
    assert_parity(Reference(models["base"], default=models["value"]), requests, outputs)


def test_seeded_sampling_repeats_itself_and_follows_the_weight(models):
    with engine(models["base"], **ivl_vllm.engine_args(value_model=str(models["value"]))) as llm:
        rng = random.Random(3)
        prompt = [rng.randrange(4, 320) for _ in range(9)]

        def sample(weight, seed, crowd):
            requests = [Request(prompt, {}, weight, {"temperature": 0.7, "seed": seed, "max_tokens": 8})]
            requests += random_requests(crowd, seed=5, last_arrival=1)
            return list(run(llm, requests)[0].outputs[0].token_ids)

        assert sample(1.0, 1, 0) == sample(1.0, 1, 5)
        assert sample(1.0, 1, 0) != sample(1.0, 2, 0)
        assert sample(1.0, 1, 0) != sample(0.0, 1, 0)


def test_batch_sharded_sampling_is_refused(models):
    """Only runner V2 has it, over two ranks or more: it samples from logits that never meet the value networks."""
    from vllm.engine.arg_utils import EngineArgs

    on = ivl_vllm.engine_args(value_model=str(models["value"]))
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    arguments = EngineArgs(
        model=str(models["base"]), **on, **ranks, enable_batch_sharded_sampling=True, max_model_len=256
    )
    with pytest.raises(ValueError, match="--no-enable-batch-sharded-sampling"):
        arguments.create_engine_config()
