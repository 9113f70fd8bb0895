"""Steps that need no value network run none: exact all the same, and requests never read what was not written."""

import contextlib
import random
from types import SimpleNamespace
from typing import ClassVar

import pytest
from parity import Reference, Request, assert_parity, engine, metric, mismatches, run

import ivl_vllm
from ivl_vllm.serving.network_checks import fingerprint
from ivl_vllm.serving.steps import ALL_NETWORKS, needed_networks
from ivl_vllm.settings import NetworkSource


@pytest.fixture(scope="module")
def reference(models):
    return Reference(models["base"], math=models["value"], style=(models["sliding"], models["anti"]))


def values(models):
    return {
        "math": {"model": str(models["value"])},
        "style": {"model": str(models["sliding"]), "minus": str(models["anti"])},
    }


@pytest.fixture
def forwards(monkeypatch):
    """How many steps each network has run, by its number; and all steps under "base"."""
    from ivl_vllm.serving.joined_model import _Join

    counts = {"base": 0, 0: 0, 1: 0, 2: 0}
    choose = _Join.choose

    def counted(self):
        active = choose(self)
        counts["base"] += 1
        for number in active:
            counts[number] += 1
        return active

    monkeypatch.setattr(_Join, "choose", counted)
    return counts


def shared_prefixes(count, seed):
    """Requests of every kind whose prompts begin alike: unsteered, steered by either value, by both."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(4, 320) for _ in range(length)] for length in (70, 100)]
    kinds = [{}, {"math": 1.0}, {"style": 2.0}, {"math": -1.0, "style": 1.0}, {}]
    requests = []
    for number in range(count):
        weights = kinds[number % len(kinds)]
        prompt = prefixes[rng.randrange(2)] + [rng.randrange(4, 320) for _ in range(rng.randrange(1, 8))]
        requests.append(Request(prompt, weights, weights or 0, {"max_tokens": rng.randrange(2, 14)}, 9 * number))
    return requests


def test_mixed_traffic(models, reference, forwards):
    """Few blocks, so that requests are preempted; long common prefixes; quiet stretches between steered requests."""
    with engine(
        models["base"],
        **ivl_vllm.engine_args(values=values(models)),
        max_num_batched_tokens=32,
        num_gpu_blocks_override=14,
        disable_log_stats=False,
    ) as llm:
        before = dict(forwards)
        requests = shared_prefixes(40, seed=71)
        outputs = run(llm, requests)
        crowd = [Request(r.prompt, r.weights, r.ivl, {"max_tokens": 30}) for r in shared_prefixes(12, seed=72)]
        crowded = run(llm, crowd)
        assert metric(llm, "vllm:num_preemptions") > 0
    assert_parity(reference, requests, outputs)
    assert_parity(reference, crowd, crowded)
    for kind in ({}, {"math": 1.0}, {"style": 2.0}):  # each kind shares prefixes among its own
        assert sum(o.num_cached_tokens for r, o in zip(requests, outputs) if r.weights == kind) > 0
    ran = {number: forwards[number] - before[number] for number in forwards}
    assert ran[1] == ran[2]  # a pair runs together
    assert 0 < ran[0] < 0.8 * ran["base"] and 0 < ran[1] < 0.8 * ran["base"]


PROMPT = list(range(10, 110))


def steered_after_unsteered(llm):
    """The same prompt, first unsteered, then steered."""
    unsteered = Request(PROMPT, {}, 0, {"max_tokens": 4})
    steered = Request([*PROMPT, 7], {"math": 2.0}, 2.0, {"max_tokens": 8})
    return [unsteered, steered], [*run(llm, [unsteered]), *run(llm, [steered])]


def test_prefixes_are_kept_apart_or_all_networks_run(models, reference, forwards, monkeypatch):
    """With the setting off, prefixes are shared and every network runs; without the salt, skipping would be wrong."""
    from vllm.v1.engine.core import EngineCore

    with engine(models["base"], **ivl_vllm.engine_args(values=values(models), skip_unsteered=False)) as llm:
        before = dict(forwards)
        requests, outputs = steered_after_unsteered(llm)
        assert not mismatches(reference, requests, outputs)
        assert outputs[1].num_cached_tokens > 0
        assert len({forwards[number] - before[number] for number in forwards}) == 1
    with engine(models["base"], **ivl_vllm.engine_args(values=values(models))) as llm:
        requests, outputs = steered_after_unsteered(llm)
        assert not mismatches(reference, requests, outputs)
        assert outputs[1].num_cached_tokens == 0
        llm.reset_prefix_cache()
        monkeypatch.setattr(EngineCore, "preprocess_add_request", EngineCore.preprocess_add_request.__wrapped__)
        requests, outputs = steered_after_unsteered(llm)
        assert outputs[1].num_cached_tokens > 0
        assert mismatches(reference, requests, outputs)  # read value keys that nobody wrote


def test_prompt_logprobs_under_a_default_weight(models, reference, forwards):
    """They describe base + default_weight * value, whatever the request's own weight; in chunks, too."""
    with engine(
        models["base"], **ivl_vllm.engine_args(values=values(models), default_weight=0.5), max_num_batched_tokens=32
    ) as llm:
        prompt = PROMPT[:75]
        for weights, ivl in (({"math": 0.5}, ...), ({}, 0), ({"style": 1.0}, {"style": 1.0})):
            asked = Request(prompt, weights, ivl, {"max_tokens": 3, "prompt_logprobs": 2})
            (output,) = run(llm, [asked])
            assert not mismatches(reference, [asked], [output])
            expected = reference.logits(prompt, {"math": 0.5}).log_softmax(-1)
            alone = reference.logits(prompt, {}).log_softmax(-1)
            differences = []
            for position, of_token in enumerate(output.prompt_logprobs[1:]):
                for token, logprob in of_token.items():
                    assert abs(logprob.logprob - expected[position, token].item()) < 1e-3
                    differences.append(abs(logprob.logprob - alone[position, token].item()))
            assert max(differences) > 0.1  # not the base's own


def admit(extra_args, salt=None, resumable=False, **changes):
    """Has the engine core admit a request beside one pair; gives its salt and the networks that it needs."""
    from vllm import SamplingParams
    from vllm.v1.engine.core import EngineCore

    from ivl_vllm.plugin import PROCESSOR, register
    from ivl_vllm.settings import Settings, Value

    register()
    settings = Settings({"math": Value("org/a", "org/b")})

    class Config:
        additional_config: ClassVar = {"ivl": settings.to_dict(), "ivl_engine": {"fingerprint": "abc"}}
        parallel_config = SimpleNamespace(data_parallel_size=1)
        compilation_config = SimpleNamespace(mode=0)
        model_config = SimpleNamespace(logits_processors=[PROCESSOR])
        kv_transfer_config = None

    config = Config()
    vars(config).update(changes)
    core = SimpleNamespace(vllm_config=config, mm_receiver_cache=None, request_block_hasher=None)
    params = SamplingParams(extra_args=dict(extra_args))
    request = SimpleNamespace(sampling_params=params, resumable=resumable, cache_salt=salt, mm_features=None)
    with contextlib.suppress(AttributeError):  # vLLM's own part wants a whole request
        EngineCore.preprocess_add_request(core, request)
    assert params.extra_args == extra_args  # the caller's own stays as it is
    return request.cache_salt, needed_networks(settings, request.sampling_params)


def test_a_session_with_streamed_input_runs_all_networks():
    """Its next input may ask for other weights, and the keys of the earlier ones must be there."""
    assert admit({"ivl": 0}, "mine") == ("mine\0ivl:", frozenset())
    assert admit({"ivl": 0}, "mine", resumable=True) == ("mine\0ivl:0,1", {0, 1})


def test_a_request_without_networks_shares_blocks_with_plain_vllm():
    assert admit({"ivl": 0}) == (None, frozenset())
    assert admit({"ivl": 1.0}) == ("\0ivl:0,1", {0, 1})


def test_clients_cannot_set_marks():
    assert admit({"ivl": 0, ALL_NETWORKS: True, "other": 1}) == (None, frozenset())


def test_blocks_that_a_connector_stores_belong_to_these_networks(tmp_path):
    """Where the prompt's blocks are found by an engine with other networks, its own would be steered by their keys."""
    assert admit({"ivl": 0}, kv_transfer_config="a connector")[0] == "\0ivl:abc"
    assert admit({"ivl": 1.0}, "mine", kv_transfer_config="a connector")[0] == "mine\0ivl:abc"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    sources = [NetworkSource(str(tmp_path / "a"))]
    before = fingerprint(sources)
    assert fingerprint(list(sources)) == before != fingerprint(sources * 2)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"retrain")
    assert fingerprint(sources) != before
    assert fingerprint([NetworkSource("org/a")]) != fingerprint([NetworkSource("org/b")])
