"""From demonstrations to served answers: `ivl train` writes the folder, vLLM serves it, the reference agrees."""

import json
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from parity import Reference, assert_parity, engine, random_requests, run
from test_server import serve
from training_tools import ONE_GPU

import ivl_vllm


def losses(model, rows, tokenizer):
    """Mean cross-entropy of the completions, by a plain forward of `model(ids)`."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        ids = prompt + answer
        logits = model(ids)[len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return total / count


def through_an_engine(base, value, requests):
    """vLLM in this process."""
    with engine(base, **ivl_vllm.engine_args(value_model=str(value))) as llm:
        return run(llm, requests)


def through_a_server(base, value, requests):
    """`vllm serve` as the model card tells it, and HTTP requests, eight at a time."""
    settings = json.dumps({"ivl": {"value_model": str(value)}})

    def ask(request):
        ivl = request.ivl
        if isinstance(ivl, dict):
            ivl = ",".join(f"{name}={weight}" for name, weight in ivl.items())
        body = {"model": "base", "prompt": request.prompt, "temperature": 0, "ignore_eos": True, **request.params}
        body |= {"return_token_ids": True} | ({} if ivl in (..., "") else {"vllm_xargs": {"ivl": ivl}})
        http = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(http, timeout=120) as answer:
            (choice,) = json.load(answer)["choices"]
        outputs = [SimpleNamespace(token_ids=choice["token_ids"])]
        return SimpleNamespace(prompt_token_ids=request.prompt, outputs=outputs)

    with (
        serve(base, "--logits-processor", "ivl", "--additional-config", settings) as url,
        ThreadPoolExecutor(8) as pool,
    ):
        return list(pool.map(ask, requests))


@pytest.mark.parametrize(
    ("scheme", "through"),
    [("residual", through_a_server), ("cascade+text", through_an_engine)],
    ids=["residual, HTTP", "cascade+text, in process"],
)
def test_a_trained_value_network_is_served_as_it_was_trained(models, tmp_path, scheme, through):
    from transformers import AutoTokenizer

    names = ["fox", "dog", "world", "quick", "brown", "lazy", "user", "system"]
    rows = [{"prompt": f"say {a} {b}", "completion": f" {b} {a}"} for a in names for b in names if a != b]
    held_out, rows = rows[::7], [row for i, row in enumerate(rows) if i % 7]
    data = tmp_path / "demonstrations.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--base", str(models["base"]), "--init", str(models["anti"]), "--data", str(data), "--scheme", scheme]
    output = tmp_path / "value"
    flags += ["--output", str(output), "--lr", "2e-3", "--epochs", "12", "--batch_size", "16", "--lambda", "0.01"]
    subprocess.run([sys.executable, "-m", "ivl_vllm.cli", "train", *flags], env=ONE_GPU, check=True, timeout=300)

    reference = Reference(models["base"], {"default": scheme}, default=output)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    before = losses(lambda ids: reference.logits(ids, {}), held_out, tokenizer)
    after = losses(lambda ids: reference.logits(ids, {"default": 1.0}), held_out, tokenizer)
    assert after < 0.7 * before

    requests = random_requests(20, seed=67, last_arrival=5)
    for request, row in zip(requests, held_out):
        request.prompt = tokenizer(row["prompt"])["input_ids"]
    assert_parity(reference, requests, through(models["base"], output, requests))
