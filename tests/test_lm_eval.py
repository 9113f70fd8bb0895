"""lm-evaluation-harness, unmodified, on an engine with a default weight: its scores are those of base + weight * value.

One run of the harness's own command answers a generation task and a log-likelihood task of ours.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from parity import ENGINE, Reference
from transformers import AutoTokenizer

TASKS = Path(__file__).parent / "lm_eval_tasks"
WEIGHT = 1.5
STEERED, BASE_ALONE = {"default": WEIGHT}, {"default": 0.0}


class Answers:
    """What a Hugging Face reference in fp32 answers."""

    def __init__(self, base, value):
        self.reference = Reference(base, default=value)
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def generate(self, prompt, weights, count):
        ids = self.tokenizer(prompt).input_ids
        output = []
        while len(output) < count:
            token = int(self.reference.logits([*ids, *output], weights)[-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            output.append(token)
        # The harness asks for special tokens too; vLLM holds an unfinished character back, at the end of an answer too.
        return self.tokenizer.decode(output, skip_special_tokens=False).rstrip("\ufffd")

    def loglikelihood(self, prompt, choice, weights):
        start, ids = len(self.tokenizer(prompt).input_ids), self.tokenizer(prompt + choice).input_ids
        logprobs = self.reference.logits(ids, weights).log_softmax(-1)
        greedy = logprobs.argmax(-1).tolist()[start - 1 : -1] == ids[start:]
        return sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))), greedy

    def choices(self, doc, weights):
        # The harness puts a space between question and choice.
        return [self.loglikelihood(doc["question"], f" {choice}", weights) for choice in doc["choices"]]

    def choose(self, doc, weights):
        likelihoods = [likelihood for likelihood, _ in self.choices(doc, weights)]
        return likelihoods.index(max(likelihoods))


@pytest.fixture(scope="module")
def answers(models):
    return Answers(models["base"], models["value"])


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def rewritten(path):
    rows = read_rows(path)
    yield rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def results(models, answers, tmp_path_factory):
    """(scores by task, logged samples by task, the tasks' folder) of one run of the command."""
    root = tmp_path_factory.mktemp("harness")
    tasks = shutil.copytree(TASKS, root / "tasks")
    # To every second question the right answer is what steering gives, so that no score is 0 or 1.
    with rewritten(tasks / "generate.jsonl") as rows:
        for row in rows[::2]:
            row["answer"] = answers.generate(row["question"], STEERED, 6)
    with rewritten(tasks / "choose.jsonl") as rows:
        for number, row in enumerate(rows):
            row["label"] = (answers.choose(row, STEERED) + number % 2) % len(row["choices"])
    settings = {"ivl": {"value_model": str(models["value"]), "default_weight": WEIGHT}}
    arguments = {"pretrained": str(models["base"]), "logits_processors": ["ivl"], "additional_config": settings}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "vllm"),
            *("--model_args", json.dumps(arguments | ENGINE)),
            *("--tasks", "ivl_generate,ivl_choose", "--include_path", tasks),
            *("--output_path", root / "out", "--log_samples"),
        ],
        cwd=tasks,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (summary,) = (root / "out").rglob("results_*.json")
    samples = {
        name: read_rows(*[next((root / "out").rglob(f"samples_{name}_*.jsonl"))])
        for name in ("ivl_generate", "ivl_choose")
    }
    return json.loads(summary.read_text())["results"], samples


def test_generation_is_steered(results, answers):
    scores, samples = results
    differs = 0
    for sample in samples["ivl_generate"]:
        question = sample["doc"]["question"]
        text = sample["resps"][0][0].rstrip("\ufffd")
        assert text == answers.generate(question, STEERED, 6), question
        differs += text != answers.generate(question, BASE_ALONE, 6)
    # Negative control: the base alone answers otherwise.
    assert differs >= len(samples["ivl_generate"]) // 2
    expected = sum(s["doc"]["answer"] == s["resps"][0][0] for s in samples["ivl_generate"]) / 12
    assert 0.2 < expected < 0.8
    assert scores["ivl_generate"]["exact_match,none"] == pytest.approx(expected)


def test_log_likelihoods_are_the_steered_models(results, answers):
    scores, samples = results
    right = {"steered": 0, "base": 0}
    for sample in samples["ivl_choose"]:
        given = [(float(likelihood), greedy == "True") for ((likelihood, greedy),) in sample["resps"]]
        doc = sample["doc"]
        expected, alone = (answers.choices(doc, weights) for weights in (STEERED, BASE_ALONE))
        assert [likelihood for likelihood, _ in given] == pytest.approx(
            [likelihood for likelihood, _ in expected], abs=1e-3
        )
        assert [greedy for _, greedy in given] == [greedy for _, greedy in expected]
        # Negative control: without the default weight the numbers are others.
        assert max(abs(a - b) for (a, _), (b, _) in zip(given, alone)) > 0.1
        right["steered"] += answers.choose(doc, STEERED) == doc["label"]
        right["base"] += answers.choose(doc, BASE_ALONE) == doc["label"]
    assert scores["ivl_choose"]["acc,none"] == right["steered"] / len(samples["ivl_choose"]) == 0.5
    assert right["base"] != right["steered"]
