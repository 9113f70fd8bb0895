"""The real server, over HTTP, with the OpenAI client: steered, unsteered and bad requests at once."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from parity import engine

import ivl_vllm

BIN = Path(sys.executable).parent
LENGTH = ["--max-model-len", "256"]
SMALL = [
    "--dtype",
    "float32",
    "--enforce-eager",
    *LENGTH,
    "--kv-cache-memory-bytes",
    str(64 << 20),
    "--gpu-memory-utilization",
    "0.3",
    "--max-num-seqs",
    "16",
]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "and", "says", "hello", "to", "world", "system", "true"]


def settings(models) -> str:
    values = {
        "math": {"model": str(models["value"])},
        "style": {"model": str(models["anti"])},
        "prose": {"model": str(models["value"]), "minus": str(models["anti"])},
    }
    return json.dumps({"ivl": {"values": values, "max_weight": 5.0}})


@contextlib.contextmanager
def serve(model, *arguments):
    """`vllm serve` on a free port of this machine, until the `with` block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(BIN / "vllm"),
        "serve",
        str(model),
        "--served-model-name",
        "base",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(
        [*command, *SMALL, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log: list[str] = []
    import threading

    threading.Thread(target=lambda: log.extend(server.stdout), daemon=True).start()
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            assert server.poll() is None, "".join(log)[-5000:]
            time.sleep(1)
        else:
            raise TimeoutError("".join(log)[-5000:])
        yield f"http://127.0.0.1:{port}"
        assert server.poll() is None, "".join(log)[-5000:]
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def server(models):
    with serve(models["base"], "--logits-processor", "ivl", "--additional-config", settings(models)) as url:
        yield url


SOLVED = ["auto:prose", "2.0;max_kl=0.5", "math=1.0,style=-1.0;max_kl=0.2"]


def good_requests(count: int) -> list[dict]:
    rng = random.Random(3)
    requests = []
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
        ivl = rng.choice([..., 0, 1.0, 2, True, False, "math=0.5,style=1.0", "style=-1", -1.5, *SOLVED])
        requests.append(
            {
                "text": text,
                "ivl": ivl,
                "chat": number % 3 == 0,
                "stream": number % 2 == 0,
                "tokens": rng.randrange(2, 16),
            }
        )
    return requests


BAD = [
    "strong",
    "",
    "1.0x",
    "math=",
    "math=1,math=1",
    "other=1.0",
    "math=nan",
    "auto",
    "auto:other",
    "1.0;max_kl=-1",
    5.5,
    -6,
    [1.0],
    ["math=1"],
    {"math": 1.0},
    None,
]


async def ask(client: openai.AsyncOpenAI, request: dict) -> str:
    """The text of the answer, however it is asked for."""
    body = {} if request["ivl"] is ... else {"vllm_xargs": {"ivl": request["ivl"]}}
    common = {"model": "base", "temperature": 0, "max_tokens": request["tokens"], "stream": request["stream"]}
    common["extra_body"] = body | {"ignore_eos": True, "skip_special_tokens": False}
    if request["chat"]:
        messages = [{"role": "user", "content": request["text"]}]
        answer = await client.chat.completions.create(messages=messages, **common)
        if not request["stream"]:
            return answer.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])
    answer = await client.completions.create(prompt=request["text"], **common)
    if not request["stream"]:
        return answer.choices[0].text
    return "".join([chunk.choices[0].text async for chunk in answer if chunk.choices])


def offline(models, requests: list[dict]) -> list[str]:
    from vllm import SamplingParams

    values = json.loads(settings(models))["ivl"]["values"]
    with engine(models["base"], **ivl_vllm.engine_args(values=values)) as llm:
        texts = []
        for request in requests:
            ivl = request["ivl"]
            extra = {} if ivl is ... else {"extra_args": {"ivl": ivl}}
            params = SamplingParams(
                temperature=0, max_tokens=request["tokens"], ignore_eos=True, skip_special_tokens=False, **extra
            )
            if request["chat"]:
                outputs = llm.chat([{"role": "user", "content": request["text"]}], params, use_tqdm=False)
            else:
                outputs = llm.generate(request["text"], params, use_tqdm=False)
            texts.append(outputs[0].outputs[0].text)
    return texts


def test_mixed_load(server, models):
    """64 requests at once, some of every bad kind: the good ones get the offline answers, the bad ones HTTP 400."""
    good = good_requests(64 - len(BAD))
    bad = [
        {"text": "hello", "ivl": ivl, "chat": i % 2 == 0, "stream": i % 3 == 0, "tokens": 4}
        for i, ivl in enumerate(BAD)
    ]
    mixed = good + bad
    random.Random(1).shuffle(mixed)

    async def load() -> list:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(ask(client, request) for request in mixed), return_exceptions=True)

    answers = dict(zip(map(id, mixed), asyncio.run(load())))
    for request in bad:
        answer = answers[id(request)]
        assert isinstance(answer, openai.BadRequestError), (request, answer)
        assert answer.status_code == 400 and "ivl" in str(answer), (request, answer)
    expected = offline(models, good)
    for request, text in zip(good, expected):
        assert answers[id(request)] == text, request
    # A server that ignored the weights would give one answer for each text and length.
    (plain,) = offline(models, [{"text": "hello world", "ivl": ..., "chat": False, "stream": False, "tokens": 8}])
    (steered,) = offline(models, [{"text": "hello world", "ivl": 1.0, "chat": False, "stream": False, "tokens": 8}])
    assert plain != steered


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-5.01"])
def test_numbers_that_json_clients_do_not_send(server, number):
    body = f'{{"model": "base", "prompt": "hello", "max_tokens": 4, "vllm_xargs": {{"ivl": {number}}}}}'
    request = urllib.request.Request(f"{server}/v1/completions", body.encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 400 and "ivl" in error.value.read().decode()


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_other_ways_in_give_what_chat_completions_give(server, models, tmp_path):
    messages = [{"role": "user", "content": "the quick brown"}]
    common = {"model": "base", "temperature": 0}
    ways = {
        "chat/completions": (
            {"messages": messages, "max_tokens": 8},
            lambda answer: answer["choices"][0]["message"]["content"],
        ),
        "responses": (
            {"input": messages, "max_output_tokens": 8},
            lambda answer: answer["output"][-1]["content"][-1]["text"],
        ),
        "messages": ({"messages": messages, "max_tokens": 8}, lambda answer: answer["content"][-1]["text"]),
    }
    weights = [0, 1.0, "math=-2,style=1"]
    texts = {}
    for way, (body, read) in ways.items():
        url = f"{server}/v1/{way}"
        texts[way] = [read(post(url, {**common, **body, "vllm_xargs": {"ivl": ivl}})) for ivl in weights]
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url, {**common, **body, "vllm_xargs": {"ivl": "strong"}})
        assert error.value.code == 400 and "ivl: strong" in error.value.read().decode().replace("'", "")
    expected = texts["chat/completions"]
    assert texts == dict.fromkeys(ways, expected) and len(set(expected)) == len(weights)

    body = {**common, "messages": messages, "max_tokens": 8}
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, "vllm_xargs": {"ivl": ivl}},
        }
        for i, ivl in enumerate([*weights, "strong"])
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [str(BIN / "vllm"), "run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    command += ["--model", str(models["base"]), "--served-model-name", "base", *SMALL]
    command += ["--logits-processor", "ivl", "--additional-config", settings(models)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    answers = {row["custom_id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    for i, text in enumerate(expected):
        assert answers[str(i)]["response"]["body"]["choices"][0]["message"]["content"] == text
    assert "ivl" in json.dumps(answers["3"]) and "strong" in json.dumps(answers["3"]["error"])


def test_vllm_bench_serve_runs_unchanged(server, models, tmp_path):
    command = [str(BIN / "vllm"), "bench", "serve", "--backend", "openai", "--base-url", server, "--model", "base"]
    command += [
        "--tokenizer",
        str(models["base"]),
        "--dataset-name",
        "random",
        "--num-prompts",
        "8",
        "--random-input-len",
        "8",
    ]
    command += ["--random-output-len", "4", "--extra-body", '{"vllm_xargs": {"ivl": 1.0}}', "--save-result"]
    command += ["--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 8 and result["total_output_tokens"] == 32


def test_vllm_bench_throughput_runs_unchanged(models, tmp_path):
    command = [str(BIN / "vllm"), "bench", "throughput", "--model", str(models["base"]), "--dataset-name", "random"]
    command += ["--num-prompts", "8", "--random-input-len", "8", "--random-output-len", "4", *SMALL]
    command += [
        "--logits-processors",
        "ivl",
        "--additional-config",
        settings(models),
        "--output-json",
        str(tmp_path / "result.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert json.loads((tmp_path / "result.json").read_text())["tokens_per_second"] > 0


def test_a_server_with_wrong_settings_says_why_and_stops(models):
    done = subprocess.run(
        [str(BIN / "vllm"), "serve", str(models["base"]), *LENGTH, "--logits-processor", "ivl"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (
        done.returncode != 0
        and "ivl: the logits processor `ivl` is on but there is no value network" in done.stdout + done.stderr
    )
