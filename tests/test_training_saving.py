"""What is read back from checkpoints, and a result that replaces an earlier one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_tools import STEPS, assert_close_weights, make_family, make_tokenizer, train, weights

from ivl_vllm.training.checks import fp16_note
from ivl_vllm.training.folders import publish_files


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


BEST = ("--eval_fraction=0.2", "--eval_strategy=steps", "--eval_steps=2", "--load_best_model_at_end=true")
# Not the last: the norm falls at the end of such a run.
NOT_LAST = ("--lr=0.5", "--metric_for_best_model=eval_norm", "--greater_is_better=true")


@pytest.mark.parametrize("save_total_limit", [1, 8])
def test_the_best_adapter_is_the_one_that_is_saved(family, tmp_path, save_total_limit):
    more = (*STEPS, *BEST, *NOT_LAST, "--lora_rank=4", f"--save_total_limit={save_total_limit}")
    trainer = train(family, tmp_path / "value", *more)
    best = Path(trainer.state.best_model_checkpoint)
    result, last = weights(tmp_path / "value"), max((tmp_path / "value").glob("checkpoint-*"))
    assert_close_weights(result, weights(best), rtol=1e-4, atol=1e-4)
    if save_total_limit > 1:
        assert last != best
        assert any(not torch.allclose(tensor, result[name], atol=1e-2) for name, tensor in weights(last).items())


@pytest.fixture(scope="module")
def mixture(family):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(family / "mixture")
    tokenizer.save_pretrained(family / "mixture")
    return family / "mixture"


def test_experts_of_a_mixture_are_read_back(family, mixture, tmp_path):
    more = (f"--init={mixture}", *STEPS, "--lr=0.01", "--max_steps=4")
    whole = train(family, tmp_path / "whole", *more)
    train(family, tmp_path / "cut", *more, "--save_total_limit=4")
    resumed = train(family, tmp_path / "cut", *more, f"--resume={tmp_path / 'cut' / 'checkpoint-2'}")
    assert_close_weights(resumed.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-5)
    start = weights(mixture)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights(tmp_path / "cut").items())
    # A checkpoint is a model that transformers loads, too.
    assert_close_weights(weights(tmp_path / "whole" / "checkpoint-4"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_folder_among_the_files_of_a_result_replaces_the_earlier_one(tmp_path):
    """As tokenizers with several chat templates have it."""
    target = tmp_path / "value"
    for text in ("first", "second"):
        stage = tmp_path / f"stage-{text}"
        (stage / "templates").mkdir(parents=True)
        (stage / "templates" / f"{text}.jinja").write_text(text)
        (stage / "config.json").write_text(text)
        target.mkdir(exist_ok=True)
        publish_files(stage, target)
    assert [path.name for path in (target / "templates").iterdir()] == ["second.jinja"]
    assert (target / "config.json").read_text() == "second"


def test_what_holds_in_training_is_not_what_the_result_says(family, tmp_path):
    """Training switches the cache off; who loads the result wants it."""
    train(family, tmp_path / "value", "--max_steps=1")
    assert json.loads((family / "small" / "config.json").read_text())["use_cache"] is True
    assert json.loads((tmp_path / "value" / "config.json").read_text())["use_cache"] is True


def test_shards_of_an_earlier_result_are_gone(family, tmp_path):
    output = tmp_path / "value"
    train(family, output, "--max_steps=1", "--save_strategy=no")
    stale = [output / "model-00001-of-00002.safetensors", output / "model.safetensors.index.json"]
    for path in stale:
        path.write_text("{}")
    train(family, output, "--max_steps=1", "--save_strategy=no")
    assert not any(path.exists() for path in stale) and weights(output)


def test_a_norm_that_float16_rounds_away_is_told():
    args = SimpleNamespace(fp16=True)
    assert fp16_note(args, "l1", 1.0, 152_000) == [] == fp16_note(args, "none", 1e-3, 152_000)
    assert fp16_note(SimpleNamespace(fp16=False), "l1", 1e-3, 152_000) == []
    (note,) = fp16_note(args, "l1", 1e-3, 152_000)
    assert "--lambda 0.001 and 152000 columns" in note and "6.6e-09" in note and "--bf16 true" in note
