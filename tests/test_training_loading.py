"""What a run is made of before its first step: devices, chat template, length, attention."""

import pytest
from training_tools import WORDS, flags, make_family, make_model, make_tokenizer


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def test_one_process_with_several_gpus_is_refused():
    from ivl_vllm.training.processes import check_group

    check_group(1, 1)
    with pytest.raises(ValueError, match="sees 4 GPUs .* CUDA_VISIBLE_DEVICES=0 .* torchrun --nproc_per_node 4"):
        check_group(1, 4)


def test_another_chat_template_leaves_vocabulary_and_network_alone(family, tmp_path):
    """TRL itself would give the value network the other tokenizer's tokens too."""
    from ivl_vllm.training.command import prepare

    template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    other = make_model(tmp_path / "other", make_tokenizer([*WORDS, "extra"], template))
    (tmp_path / "t.jinja").write_text(template)
    for path in (other, tmp_path / "t.jinja"):
        trainer = prepare(flags(family, tmp_path / "out", f"--chat_template_path={path}")).trainer
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
