"""What the value network starts from: a config, a small model under a LoRA adapter."""

import json

import pytest
import torch
from training_tools import (
    STEPS,
    assert_close_weights,
    flags,
    logged,
    make_family,
    make_tokenizer,
    train,
    weights,
)

from ivl_vllm import cli
from ivl_vllm.training.ivl_config import IVLConfig


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def test_from_scratch_by_a_config_that_lacks_the_vocabulary(family, tmp_path):
    content = json.loads((family / "small" / "config.json").read_text())
    own = {**content, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "dtype": "bfloat16"}
    del own["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(own))
    trained = []
    for given in (tmp_path, tmp_path / "config.json"):
        output = tmp_path / f"out{len(trained)}"
        words = [
            word for word in flags(family, output, f"--init_config={given}", "--max_steps=2") if "--init=" not in word
        ]
        assert cli.main(["train", *words]) == 0
        trained.append(weights(output))
    # The same seed gives the same start.
    assert_close_weights(*trained, rtol=0, atol=0)
    written = json.loads((tmp_path / "out0" / "config.json").read_text())
    assert written["vocab_size"] == len(make_tokenizer())
    assert (written["hidden_size"], written["dtype"]) == (16, "bfloat16")
    assert f"scratch, {tmp_path}" in (tmp_path / "out0" / "README.md").read_text()


def test_starts_that_cannot_be(family, tmp_path, capsys):
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "encoder.json").write_text('{"model_type": "vit"}')
    content = json.loads((family / "small" / "config.json").read_text())
    (tmp_path / "narrow.json").write_text(json.dumps({**content, "vocab_size": 6}))
    (tmp_path / "odd.json").write_text(json.dumps({**content, "num_attention_heads": 0}))
    for words, message in {
        (f"--init_config={tmp_path / 'absent.json'}",): "No such file or directory; give a config.json, or the folder",
        (f"--init_config={tmp_path / 'text.json'}",): "no JSON",
        (f"--init_config={tmp_path / 'list.json'}",): "no model_type",
        (f"--init_config={tmp_path / 'encoder.json'}",): "no causal LM can be built from it",
        (f"--init_config={tmp_path / 'odd.json'}",): "no causal LM can be built from it",
        (f"--init_config={tmp_path / 'narrow.json'}",): "beyond a network's vocabulary of 6",
        (f"--init_config={tmp_path}", f"--init={family / 'small'}"): "--init and --init_config were both given",
        (f"--init_config={tmp_path}", "--lora_rank=2"): "--lora_rank needs a trained model",
        ("--zero_output_layer", "--lora_rank=2"): "the zeroed output layer would never be trained",
        ("--lora_rank=-1",): "--lora_rank is -1",
    }.items():
        given = flags(family, tmp_path / "never", *words)
        if ("--init_config" in words[0] and len(words) == 1) or "--lora_rank=2" in words:
            given = [word for word in given if not word.startswith("--init=")]
        assert cli.main(["train", *given]) == 2, words
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ivl train: error: ")]
        assert len(err) == 1 and message in err[0], (words, err)
    assert not (tmp_path / "never" / "config.json").exists()


def test_lora_is_saved_merged_and_resumes(family, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    more = ("--lora_rank=4", "--lr=0.05", *STEPS)
    trainer = train(family, tmp_path / "whole", *more)
    out = capsys.readouterr().out
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"trainable parameters: {count:,} (LoRA of rank 4) of the value network's " in out
    output = tmp_path / "whole"
    for folder in (output, output / "checkpoint-8"):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        assert "model.safetensors" in names and not [name for name in names if "adapter" in name]
        assert IVLConfig.read(folder) is not None
    trainer.model.eval()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        adapted = trainer.model(ids).logits
        start = AutoModelForCausalLM.from_pretrained(family / "small")(ids).logits
        for folder in (output, output / "checkpoint-8"):
            merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
        assert (adapted - start).abs().max() > 0.1
    # The frozen part did not move.
    before, after = weights(family / "small"), weights(output)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert "LoRA adapter of rank 4, merged" in (output / "README.md").read_text()

    again = tmp_path / "again"
    train(family, again, *more, f"--resume={output / 'checkpoint-6'}")
    assert logged(again) == pytest.approx(logged(output), rel=1e-5)
    assert_close_weights(weights(again), after, rtol=1e-5, atol=1e-6)
    # The adapter's random half comes from the seed.
    train(family, tmp_path / "repeated", *more)
    assert logged(tmp_path / "repeated") == logged(output)


def test_lora_on_layers_that_keep_their_weight_transposed(family, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from ivl_vllm.training.lora import add_lora, merge_state

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    adapted = add_lora(model, 2, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.get_base_model().save_pretrained(tmp_path, state_dict=merge_state(adapted, adapted.state_dict()))
    ids = torch.tensor([[1, 2, 3]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
