"""Model runner V1: token-identical to the reference under every schedule."""

import json
import random

import pytest
import torch
from parity import Reference, Request, assert_parity, engine, metric, mismatches, random_requests, run
from tiny import make_model

import ivl_vllm
from ivl_vllm.trace_view import read_trace

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "tag": {"type": "string", "enum": ["a", "b"]}},
    "required": ["ok", "tag"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def reference(models):
    return Reference(models["base"], math=models["value"], style=(models["sliding"], models["anti"]))


@pytest.fixture(scope="module")
def llm(models):
    """Two values (one a `minus` pair) beside the base; chunked prefill in small pieces; prefix caching on."""
    values = {
        "math": {"model": str(models["value"])},
        "style": {"model": str(models["sliding"]), "minus": str(models["anti"])},
    }
    with engine(
        models["base"],
        **ivl_vllm.engine_args(values=values),
        max_num_batched_tokens=32,
        logprobs_mode="processed_logprobs",
        structured_outputs_config={"disable_any_whitespace": True, "backend": "xgrammar"},
    ) as llm:
        yield llm


def test_random_mixes(llm, reference):
    assert not llm.llm_engine.vllm_config.use_v2_model_runner
    requests = random_requests(120, seed=1, names=("math", "style"))
    outputs = run(llm, requests)
    assert_parity(reference, requests, outputs)
    # Nobody reads what was generated, so vLLM has no reason to wait for it.
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert runner.input_batch.logitsprocs_need_output_token_ids is False
    # The token budget of 32 cuts longer prompts up, and shared prefixes were read from the cache.
    assert any(len(r.prompt) - o.num_cached_tokens > 32 for r, o in zip(requests, outputs))
    assert sum(o.num_cached_tokens for o in outputs) > 0


def test_prefix_cache_hits_between_requests_of_the_same_networks(llm, reference):
    rng = random.Random(5)
    prompt = [rng.randrange(4, 320) for _ in range(100)]
    weights = [{}, {"math": 1.0}, {"style": 0.5}, {}, {"math": -1.0}, {"style": 2.0}]
    requests = [Request(prompt, w, w or ..., {"max_tokens": 8}, arrives=12 * i) for i, w in enumerate(weights)]
    outputs = run(llm, requests)
    assert_parity(reference, requests, outputs)
    assert [o.num_cached_tokens >= 64 for o in outputs] == [False, False, False, True, True, True]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 5  # the two unsteered ones agree


def test_abort_in_mid_flight(llm, reference):
    requests = random_requests(24, seed=3, names=("math", "style"), last_arrival=10)
    for i, request in enumerate(requests):
        request.params["max_tokens"] = 24
        request.aborts = 5 if i % 3 == 0 else None
    outputs = run(llm, requests)
    assert [o is None for o in outputs] == [i % 3 == 0 for i in range(24)]
    assert_parity(reference, requests, outputs)


def draw(logits, seed):
    """What vLLM's sampler draws from `[steps, vocabulary]` logits, one after the other."""
    if torch.cuda.is_available():
        from vllm.v1.sample.ops.topk_topp_sampler import random_sample

        generator = torch.Generator("cuda").manual_seed(seed)
        return [int(random_sample(row.cuda()[None].softmax(-1), {0: generator})) for row in logits]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for row in logits:
        noise = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        drawn.append(int(torch.ops._C.fused_gumbel_argmax(row[None].contiguous(), noise)))
    return drawn


def test_seeded_sampling_and_n(llm, reference):
    """The same seed gives the tokens that vLLM's own sampler draws from the reference's logits."""
    rng = random.Random(7)
    unsteered, outcomes, seed = {}, [], 3
    # Three prompts of 8 tokens fit one step: vLLM cannot rewind a CPU generator after a cut-up prompt.
    prompt = [rng.randrange(4, 320) for _ in range(8)]
    for weights in [{}, {"math": 0.7}, {"math": 1.0, "style": -0.5}]:
        params = {"temperature": 0.8, "max_tokens": 10, "seed": seed, "n": 3}
        (output,) = run(llm, [Request(prompt, weights, weights, params)])
        assert len(output.outputs) == 3
        for completion in output.outputs:
            # vLLM seeds the n samples of a request with seed, seed + 1, ...
            tokens = list(completion.token_ids)
            logits = reference.logits([*prompt, *tokens], weights)[len(prompt) - 1 : -1]
            assert tokens == draw(logits / 0.8, seed + completion.index)
            if weights:
                outcomes.append(tokens != unsteered[completion.index])
            else:
                unsteered[completion.index] = tokens
        assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    assert all(outcomes)


def test_processed_logprobs(llm, reference):
    requests = random_requests(12, seed=11, names=("math", "style"))
    for number, request in enumerate(requests):
        request.params["logprobs"] = 5
        request.params["prompt_logprobs"] = 1 if number % 3 == 0 else None
    outputs = run(llm, requests)
    assert_parity(reference, requests, outputs)
    off_base = 0.0
    # Prompt logprobs never meet the processor: they are the base's own.
    prompt = requests[0].prompt
    own = reference.logits(prompt, {}).log_softmax(-1)
    for position, chosen in enumerate(outputs[0].prompt_logprobs[1:]):
        assert abs(chosen[prompt[position + 1]].logprob - own[position, prompt[position + 1]].item()) < 1e-3
    for request, output in zip(requests, outputs):
        completion = output.outputs[0]
        ids = [*request.prompt, *completion.token_ids]
        rows = slice(len(request.prompt) - 1, -1)
        expected = reference.logits(ids, request.weights)[rows].log_softmax(-1)
        base = reference.logits(ids, {})[rows].log_softmax(-1)
        for position, chosen in enumerate(completion.logprobs):
            for token, logprob in chosen.items():
                assert abs(logprob.logprob - expected[position, token].item()) < 1e-3
                off_base = max(off_base, abs(logprob.logprob - base[position, token].item()))
    assert off_base > 0.1


def test_structured_output_stays_valid_under_a_strong_weight(llm):
    from vllm.sampling_params import StructuredOutputsParams

    prompt = llm.get_tokenizer().encode("the user says hello")
    requests = [
        Request(
            prompt,
            {},
            {"math": weight},
            {
                "structured_outputs": StructuredOutputsParams(json=SCHEMA),
                "max_tokens": 60,
                "ignore_eos": False,
                "detokenize": True,
            },
        )
        for weight in (-10.0, 0.0, 10.0)
    ]
    texts = [output.outputs[0].text for output in run(llm, requests)]
    for text in texts:
        answer = json.loads(text)
        assert isinstance(answer["ok"], bool) and answer["tag"] in ("a", "b")
    assert len(set(texts)) > 1  # the weight chose among the valid ones


def test_stop_strings(llm, reference):
    prompt = [5, 90, 17, 33]
    weights = {"math": 1.0}
    (free,) = run(llm, [Request(prompt, weights, weights, {"max_tokens": 20, "detokenize": True})])
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (stopped,) = run(llm, [Request(prompt, weights, weights, {"max_tokens": 20, "detokenize": True, "stop": [stop]})])
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].text == text[: text.index(stop)]
    (unsteered,) = run(llm, [Request(prompt, {}, 0, {"max_tokens": 20, "detokenize": True, "stop": [stop]})])
    assert unsteered.outputs[0].text != stopped.outputs[0].text


def test_bad_requests_are_refused_and_harm_no_other(llm, reference):
    good = random_requests(6, seed=13, names=("math", "style"), last_arrival=1)
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for bad in (
        "strong",
        "math",
        "math=",
        "math=a",
        "math=nan",
        "none=1.0",
        "math=1,math=2",
        [1.0],
        {"math": "1"},
        {"x": 1.0},
        float("nan"),
        float("inf"),
        11,
        -10.5,
        None,
    ):
        with pytest.raises(VLLMValidationError, match="ivl"):
            llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(extra_args={"ivl": bad}), use_tqdm=False)
    assert_parity(reference, good, run(llm, good))


def test_wrong_weight_is_noticed(llm, reference):
    """The parity check itself can fail: outputs of one weight are not the reference of another."""
    requests = random_requests(10, seed=17, names=("math",))
    for request in requests:
        request.weights, request.ivl = {"math": 1.0}, 1.0
    outputs = run(llm, requests)
    for request in requests:
        request.weights = {"math": 1.5}
    assert len(mismatches(reference, requests, outputs)) > 5


def test_weights_that_are_reloaded_in_place_are_the_bases_alone(llm, models, tmp_path):
    other = make_model(tmp_path / "other", seed=91, hidden=128, layers=3, heads=4, kv_heads=2)  # of the base's shape
    networks = {"math": models["value"], "style": (models["sliding"], models["anti"])}
    for folder in (other, models["base"]):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        llm.reset_prefix_cache()
        requests = random_requests(12, seed=92, names=("math", "style"), last_arrival=8)
        assert_parity(Reference(folder, **networks), requests, run(llm, requests))


def test_preemption_and_default_weight(models, tmp_path):
    """So few KV blocks that running requests are thrown out and computed again; a trace goes on where it was."""
    trace_file = str(tmp_path / "trace.jsonl")
    with engine(
        models["base"],
        **ivl_vllm.engine_args(value_model=str(models["value"]), default_weight=0.75, trace_file=trace_file),
        num_gpu_blocks_override=14,
        disable_log_stats=False,
        enable_prefix_caching=False,
    ) as llm:
        requests = random_requests(40, seed=19, last_arrival=5)
        for request in requests:
            request.params["max_tokens"] = 40
            if request.ivl is ...:
                request.weights = {"default": 0.75}
        assert any(r.ivl is ... for r in requests)
        traced = {f"r{n}": n for n, r in enumerate(requests) if isinstance(r.ivl, float)}
        for name, n in traced.items():
            requests[n].ivl = f"{requests[n].ivl};trace={name}"
        outputs = run(llm, requests)
        assert metric(llm, "vllm:num_preemptions") > 5
        found = {name: [token.token for token in tokens] for name, tokens in read_trace(trace_file).items()}
        assert len(traced) > 5 and found == {
            name: list(outputs[n].outputs[0].token_ids) for name, n in traced.items() if outputs[n] is not None
        }

        reference = Reference(models["base"], default=models["value"])
        assert_parity(reference, requests, outputs)

        # vLLM's default, raw logprobs, describes the base alone.
        asked = Request([7, 8, 9], {"default": 2.0}, 2.0, {"logprobs": 1, "max_tokens": 5})
        (raw,) = run(llm, [asked])
        assert_parity(reference, [asked], [raw])
        tokens = list(raw.outputs[0].token_ids)
        own = reference.logits([7, 8, 9, *tokens], {})[2:-1].log_softmax(-1)
        for position, token in enumerate(tokens):
            assert abs(raw.outputs[0].logprobs[position][token].logprob - own[position, token].item()) < 1e-3


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_beam_search(models, mode):
    """It drops a request's own weight and ranks by log-probabilities: the default weight counts if those show it."""
    from vllm.sampling_params import BeamSearchParams

    reference = Reference(models["base"], default=models["value"])
    on = ivl_vllm.engine_args(value_model=str(models["value"]), default_weight=0.75)
    with engine(models["base"], **on, logprobs_mode=mode) as llm:
        params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
        (beams,) = llm.beam_search([{"prompt_token_ids": [7, 8, 9]}], params)
    tokens = list(beams.sequences[0].tokens)[3:]
    steered, unsteered = (reference.greedy([7, 8, 9], tokens, w) for w in ({"default": 0.75}, {}))
    assert (tokens == steered, tokens == unsteered) == ((mode == "processed_logprobs"), (mode == "raw_logprobs"))
