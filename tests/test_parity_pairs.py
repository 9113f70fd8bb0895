"""Pairs of models that differ, and the engine's other ways to run: dtype, padding, windows, compilation."""

import pytest
import torch
from parity import Reference, Request, assert_parity, engine, random_requests, run, sampling_params
from tiny import VOCAB, make_model

import ivl_vllm


@pytest.mark.parametrize(
    "base, value",
    [
        # The base has a sliding window, the value network none; same heads and head size, other depth.
        ({"kind": "mistral", "window": 20, "hidden": 64, "heads": 2}, {"hidden": 64, "heads": 2, "layers": 3}),
        # Two different windows.
        ({"kind": "mistral", "window": 40}, {"kind": "mistral", "window": 12, "hidden": 128, "layers": 1}),
        # A window in the first layer only, and capped logits.
        ({"hidden": 128, "heads": 4}, {"kind": "gemma2", "window": 12, "hidden": 128}),
        # Same KV heads and head size, so the same KV cache layout, but another number of query heads; fewer columns.
        (
            {"hidden": 128, "heads": 4, "kv_heads": 2},
            {"hidden": 64, "heads": 2, "kv_heads": 2, "vocab_size": VOCAB - 4},
        ),
        # Wider heads and a larger network than the base; more columns.
        (
            {"kind": "qwen2", "hidden": 64, "layers": 1},
            {"hidden": 320, "heads": 4, "kv_heads": 4, "vocab_size": VOCAB + 60},
        ),
    ],
    ids=["window_on_base", "two_windows", "window_in_one_layer", "query_heads", "larger_value"],
)
def test_models_that_differ(tmp_path, base, value):
    folders = make_model(tmp_path / "base", seed=5, **base), make_model(tmp_path / "value", seed=6, **value)
    requests = random_requests(24, seed=31, last_arrival=10)
    with engine(folders[0], **ivl_vllm.engine_args(value_model=str(folders[1]))) as llm:
        outputs = run(llm, requests)
    assert_parity(Reference(folders[0], default=folders[1]), requests, outputs)


def test_an_output_layer_that_only_the_checkpoint_has(models, tmp_path):
    """The config says that embeddings are tied, the checkpoint brings an output layer: the checkpoint is right."""
    import json

    value = make_model(tmp_path / "value", seed=15)
    config = json.loads((value / "config.json").read_text())
    (value / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    requests = random_requests(12, seed=49)
    with engine(models["base"], **ivl_vllm.engine_args(value_model=str(value))) as llm:
        outputs = run(llm, requests)
    assert_parity(Reference(models["base"], default=value), requests, outputs)


def test_dtypes_that_differ(tmp_path):
    """A bfloat16 base and a float16 value network (`dtype` auto): log-probabilities within bfloat16's own error."""
    base = make_model(tmp_path / "base", seed=7, hidden=128, heads=4, dtype=torch.bfloat16, scale=0.1)
    value = make_model(tmp_path / "value", "qwen2", seed=8, dtype=torch.float16, scale=0.1)
    requests = random_requests(12, seed=37)
    for request in requests:
        request.params["logprobs"] = 3
    with engine(
        base, **ivl_vllm.engine_args(value_model=str(value)), dtype="auto", logprobs_mode="processed_logprobs"
    ) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        dtypes = {name.startswith("ivl_"): layer.kv_cache.dtype for name, layer in layers.items()}
        assert dtypes == {False: torch.bfloat16, True: torch.float16}
        outputs = run(llm, requests)
    reference = Reference(base, default=value)
    errors, off_base = [], 0.0
    for request, output in zip(requests, outputs):
        ids = [*request.prompt, *output.outputs[0].token_ids]
        rows = slice(len(request.prompt) - 1, -1)
        expected = reference.logits(ids, request.weights)[rows].log_softmax(-1)
        unsteered = reference.logits(ids, {})[rows].log_softmax(-1)
        for position, chosen in enumerate(output.outputs[0].logprobs):
            for token, logprob in chosen.items():
                errors.append(abs(logprob.logprob - expected[position, token].item()))
                off_base = max(off_base, abs(logprob.logprob - unsteered[position, token].item()))
    assert max(errors) < 0.15 and sum(errors) / len(errors) < 0.03
    assert off_base > 1.0


def test_dummy_weights(tmp_path):
    """`load_format="dummy"` needs no weights of either: what benchmarks of large shapes start from."""
    folders = make_model(tmp_path / "base", seed=5), make_model(tmp_path / "value", "qwen2", seed=6)
    for folder in folders:
        (folder / "model.safetensors").unlink()
    requests = random_requests(4, seed=47)
    with engine(folders[0], **ivl_vllm.engine_args(value_model=str(folders[1])), load_format="dummy") as llm:
        outputs = run(llm, requests)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [r.params["max_tokens"] for r in requests]


def test_low_rank_adapters_on_the_base(models, tmp_path, monkeypatch):
    """A LoRA adapter of one request changes the base for it alone; value networks are not wrapped."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    # vLLM's kernels for GPUs know no float32.
    in_torch = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: in_torch))

    base = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)

    prompt, params = [9, 80, 41, 7, 250], {"max_tokens": 8}
    request = Request(prompt, {"default": 1.0}, 1.0, params)
    with engine(
        models["base"], **ivl_vllm.engine_args(value_model=str(models["value"])), enable_lora=True, max_lora_rank=8
    ) as llm:
        adapter = LoRARequest("a", 1, str(tmp_path / "adapter"))
        with_adapter = llm.generate(
            {"prompt_token_ids": prompt}, sampling_params(request), lora_request=adapter, use_tqdm=False
        )
        without = llm.generate({"prompt_token_ids": prompt}, sampling_params(request), use_tqdm=False)
    for output, folder in ((with_adapter, merged), (without, models["base"])):
        assert_parity(Reference(folder, default=models["value"]), [request], output)
    assert with_adapter[0].outputs[0].token_ids != without[0].outputs[0].token_ids
