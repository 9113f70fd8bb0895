"""What the tests of `ivl train` share: a tiny task, tiny models, runs in this process and in others."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

# A process trains on one GPU.
ONE_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
# Runs are compared in float32, on the CPU.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT["TOKENIZERS_PARALLELISM"] = "false"
TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
SHARDED = (*TWO, Path(__file__).with_name("shard_on_cpu.py"))
STEPS = ("--save_strategy=steps", "--save_steps=2", "--logging_steps=1", "--max_steps=8", "--save_total_limit=2")
SGD = ("--optim=sgd", "--max_grad_norm=0", "--lr=0.05", "--max_steps=4")

WORDS = [*"abcdefghijkl", "question", "answer", ":", "?", "."]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}question : {{ m['content'] }} {% else %}"
    "answer : {{ m['content'] }} {{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


def make_tokenizer(words=WORDS, template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=template
    )
    return tokenizer


def make_model(folder, tokenizer, hidden=32, seed=0, extra_rows=0, tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + extra_rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def next_letter_rows(count, seed, kind="messages"):
    """A tiny task: the answer is the letter after the one that is asked for."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        i = rng.randrange(11)
        if kind == "messages":
            turns = [{"role": "user", "content": f"{'abcdefghijkl'[i]} ?"}]
            turns.append({"role": "assistant", "content": "abcdefghijkl"[i + 1]})
            rows.append({"messages": turns})
        else:
            rows.append(
                {
                    "prompt": f"question : {'abcdefghijkl'[i]} ? answer :",
                    "completion": f" {'abcdefghijkl'[i + 1]} <eos>",
                }
            )
    return rows


def uneven_rows(count):
    """Answers of one to five tokens, so that a mean of means is not the mean."""
    return [
        {
            "prompt": f"question : {'abcdefghijkl'[i % 11]} ? answer :",
            "completion": " " + " ".join("abcde"[: 1 + i % 5]),
        }
        for i in range(count)
    ]


def make_family(root):
    """A base, a smaller start, another base with more padding, and demonstrations."""
    tokenizer = make_tokenizer()
    make_model(root / "base", tokenizer, hidden=48, seed=1)
    make_model(root / "small", tokenizer, hidden=32, seed=2)
    make_model(root / "other", tokenizer, hidden=32, seed=4, extra_rows=3, tied=False)
    write_rows(root / "train.jsonl", next_letter_rows(128, 0))
    write_rows(root / "held_out.jsonl", next_letter_rows(40, 1))
    return root


def flags(family, output, *more):
    given = {word.split("=")[0] for word in more}
    defaults = {
        "--use_cpu": str(torch.cuda.is_available()).lower(),
        "--base": family / "base",
        "--init": family / "small",
        "--data": family / "train.jsonl",
        "--output": output,
        "--batch_size": 16,
        "--lr": 3e-3,
        "--max_steps": 30,
        "--save_strategy": "no",
        "--disable_tqdm": "true",
    }
    return [*(f"{name}={value}" for name, value in defaults.items() if name not in given), *map(str, more)]


def train(family, output, *more):
    from ivl_vllm.training.command import prepare

    run = prepare(flags(family, output, *more))
    run.run()
    return run.trainer


def run_process(family, output, *more, start=("-m", "ivl_vllm.cli"), environment=None):
    """`ivl train` in processes of its own, as a user starts it."""
    words = [sys.executable, *map(str, start), "train", *flags(family, output, *more)]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=200, env={**ENVIRONMENT, **(environment or {})}
    )


def logged(folder, name="loss"):
    history = json.loads((folder / "training_log.json").read_text())
    return {entry["step"]: entry[name] for entry in history if name in entry}


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_close_weights(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
