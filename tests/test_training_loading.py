"""What a run is made of before its first step: devices, templates, length, attention, tokenizer, how answers end."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import mistral_common
import pytest
import tiny
import torch
from training_tools import WORDS, flags, logged, make_family, make_model, make_tokenizer, train, write_rows
from transformers import AutoTokenizer, MistralConfig
from vllm.tokenizers import get_tokenizer

from ivl_vllm.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def test_one_process_with_several_gpus_is_refused():
    from ivl_vllm.training.processes import check_group

    check_group(1, 1)
    with pytest.raises(ValueError, match="sees 4 GPUs .* CUDA_VISIBLE_DEVICES=0 .* torchrun --nproc_per_node 4"):
        check_group(1, 4)


def test_a_hybrid_without_experts_trains_and_keeps_its_configuration(tmp_path):
    base = tiny.make_model(tmp_path / "base", "hybrid")
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the quick", "completion": " brown fox"}] * 4)
    given = (f"--base={base}", f"--init={base}", f"--data={data}", "--max_steps=2", "--lr=1e-3")
    trainer = train(tmp_path, tmp_path / "out", *given)
    losses = logged(tmp_path / "out")
    assert losses and all(map(math.isfinite, losses.values()))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert not before["output_router_logits"] and not trainer.model.config.output_router_logits
    for name in ("output_router_logits", "router_aux_loss_coef"):
        assert after[name] == before[name]


def test_a_multimodal_model_that_is_no_causal_lm_is_refused(tmp_path):
    from ivl_vllm.training.command import prepare

    sees, reads = tiny.make_model(tmp_path / "sees", "multimodal"), tiny.make_model(tmp_path / "reads")
    tiny.make_tokenizer(reads, sees=True)
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the quick", "completion": " brown fox"}] * 4)
    for flag, base, start in (("--base", sees, reads), ("--init", reads, sees)):
        with pytest.raises(ValueError, match=rf"^{flag} .*no causal language model of the type 'paddleocr_vl'; choose"):
            prepare(flags(tmp_path, tmp_path / "out", f"--base={base}", f"--init={start}", f"--data={data}"))


def test_another_chat_template_leaves_vocabulary_and_network_alone(family, tmp_path):
    """TRL itself would give the value network the other tokenizer's tokens too."""
    from ivl_vllm.training.command import prepare

    template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    other = make_model(tmp_path / "other", make_tokenizer([*WORDS, "extra"], template))
    (tmp_path / "t.jinja").write_text(template)
    for path in (other, tmp_path / "t.jinja"):
        run = prepare(flags(family, tmp_path / "out", f"--chat_template_path={path}"))
        assert run.takes == ("chat-template",)
        trainer = run.trainer
        tokenizer = trainer.processing_class
        assert tokenizer.chat_template == template
        assert len(tokenizer) == len(make_tokenizer()) == trainer.model.get_input_embeddings().num_embeddings
        text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
        assert text.count(".") == 2 and "question" not in text


def test_networks_with_fewer_positions_lower_the_length(family, tmp_path, capsys):
    from ivl_vllm.training.command import prepare

    run = prepare(flags(family, tmp_path / "out"))
    assert run.trainer.args.max_length == 64
    assert f"--max_length is 64: --base {family / 'base'} has no more positions" in capsys.readouterr().out
    assert prepare(flags(family, tmp_path / "out", "--max_length=32")).trainer.args.max_length == 32
    assert "no more positions" not in capsys.readouterr().out


def test_the_attention_can_be_chosen(family, tmp_path):
    from ivl_vllm.training.command import prepare

    for chosen in ("eager", "sdpa"):
        words = f'--model_init_kwargs={{"attn_implementation": "{chosen}"}}'
        trainer = prepare(flags(family, tmp_path / "out", words)).trainer
        assert {trainer.model.config._attn_implementation, trainer.base.config._attn_implementation} == {chosen}


def test_flash_attention_needs_half_precision():
    from ivl_vllm.training.checks import check_attention

    def network(dtype, attention="flash_attention_2"):
        return SimpleNamespace(dtype=dtype, config=SimpleNamespace(_attn_implementation=attention))

    half, full = {"--base b": network(torch.bfloat16)}, {"--base b": network(torch.float32)}
    check_attention(half, network(torch.float32), True)
    check_attention(full, network(torch.float32, "sdpa"), False)
    with pytest.raises(ValueError, match="flash_attention_2 takes bfloat16.*--bf16 true"):
        check_attention(half, network(torch.float32), False)
    with pytest.raises(ValueError, match="--base b is float32 on disk"):
        check_attention(full, network(torch.float32), True)


def test_networks_are_tried_out_in_the_precision_that_they_train_in(family, tmp_path, monkeypatch):
    """FlashAttention refuses float32, which the value network has outside of autocast."""
    from transformers import LlamaForCausalLM

    from ivl_vllm.training.command import prepare

    seen, forward = [], LlamaForCausalLM.forward

    def recorded(self, *args, **kwargs):
        seen.append((self.dtype, torch.is_autocast_enabled("cpu")))
        return forward(self, *args, **kwargs)

    half = make_model(tmp_path / "half", make_tokenizer(), seed=1)
    LlamaForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    monkeypatch.setattr(LlamaForCausalLM, "forward", recorded)
    prepare(flags(family, tmp_path / "out", f"--base={half}", "--bf16=true", "--use_cpu=true", "--packing=true"))
    assert {dtype for dtype, _ in seen} == {torch.float32, torch.bfloat16}
    assert all(is_mixed for dtype, is_mixed in seen if dtype == torch.float32)


def test_answers_that_end_where_no_server_stops(family, tmp_path, capsys):
    """ChatML's turns end with <|im_end|>, while many bases' end-of-text token is another one."""
    from ivl_vllm.training.command import prepare

    prepare(flags(family, tmp_path / "out"))
    assert "warning" not in capsys.readouterr().out
    template = "{% for m in messages %}{{ m['content'] }} <|im_end|>\n{% endfor %}"
    tokenizer = make_tokenizer([*WORDS, "<|im_end|>"], template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    base = make_model(tmp_path / "base", tokenizer)
    words = flags(family, tmp_path / "value", f"--base={base}", f"--init={base}", "--max_steps=2")
    prepare(words).run()
    told = capsys.readouterr().out
    assert "no trained answer ends with '<eos>'" in told and "answers end with '<|im_end|>'" in told
    command = f"--generation-config {tmp_path / 'value'}"
    assert command in told and command in (tmp_path / "value" / "README.md").read_text()
    ends = json.loads((tmp_path / "value" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_what_answers_end_with():
    from datasets import Dataset

    from ivl_vllm.training.turn_ends import find_other_end

    texts = dict(enumerate(["<eos>", "a", "<end>", "\n", "</think>"]))
    tokenizer = SimpleNamespace(
        all_special_ids=[0], added_tokens_decoder={2: "", 3: "", 4: ""}, decode=lambda ids: texts[ids[0]]
    )

    def found(*labels):
        return find_other_end(Dataset.from_dict({"labels": list(labels)}), tokenizer, {0})

    assert found([-100, 1, 2, 3], [1, 2, 3], [1, 1]) == (True, 2)  # behind it a line break, of a token of its own
    assert found([-100, 1, 2, 3], [1, 0]) == (False, None)
    assert found([1, 4, 1], [1, 1], [1, 2]) == (True, None)


@pytest.mark.parametrize("told", [{"temperature": 0.9, "top_p": 0.6}, {"early_stopping": True}])
def test_a_start_whose_generation_config_transformers_would_not_save(family, tmp_path, told):
    start = shutil.copytree(family / "small", tmp_path / "start")
    content = json.loads((start / "generation_config.json").read_text())
    (start / "generation_config.json").write_text(json.dumps(content | told))
    train(family, tmp_path / "value", f"--init={start}", "--max_steps=2")
    saved = json.loads((tmp_path / "value" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == content["eos_token_id"]


def test_the_tokenizer_is_the_one_that_the_server_has(tmp_path):
    """transformers takes mistral-common's, which knows neither eos in text nor chat templates, where its file lies."""
    own = make_tokenizer()
    own.save_pretrained(tmp_path)
    MistralConfig().save_pretrained(tmp_path)
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    assert len(AutoTokenizer.from_pretrained(tmp_path)) > 100_000
    assert get_tokenizer(str(tmp_path)).get_vocab() == own.get_vocab()
    found = read_tokenizer(tmp_path)
    assert found.get_vocab() == own.get_vocab() and found.chat_template == own.chat_template
