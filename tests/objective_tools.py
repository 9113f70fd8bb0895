"""Tiny networks and the naive loss on whole logits, which the tests of the joint loss compare with."""

import torch

from ivl_vllm.training.objective import residual_terms, sum_terms

NORMS = ["l1", "l2", "none"]


SCHEMES = ["residual", "cascade", "cascade+text"]


VOCAB = 29


def sizes(vocab, tied, **more):
    return {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
        **more,
    }


def llama(vocab=VOCAB, tied=False, seed=0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes(vocab, tied, hidden_size=20, head_dim=8, **more)))


def qwen2(vocab=VOCAB, tied=True, seed=1, **more):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**sizes(vocab, tied, **more)))


def gemma(kind):
    """Gemma's embeddings are scaled, in the layer itself (3) or after it (1, 2); the logits of 2 are capped."""
    import transformers

    torch.manual_seed(2)
    config = getattr(transformers, f"{kind}Config")(**sizes(VOCAB, True, head_dim=8, pad_token_id=0))
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)


def make_batch(seed=5, rows=3, length=11):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (rows, length), generator=generator)
    labels, attention = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : 3 + row] = -100
        if row:
            labels[row, -row:] = -100
            attention[row, -row:] = 0
    labels[0, 7] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def naive(value, base_logits, batch, scheme, norm, weight, everywhere=False):
    """Summed loss on whole logits; `base_logits` is [B, T, V_base]. `everywhere` takes the norm at prompts too."""
    inputs = {"attention_mask": batch["attention_mask"]}
    if scheme == "residual":
        inputs["input_ids"] = batch["input_ids"]
    else:
        layer = value.get_input_embeddings()
        shared = min(layer.num_embeddings, base_logits.shape[-1])
        table = layer(torch.arange(layer.num_embeddings))[:shared]
        inputs["inputs_embeds"] = base_logits.float().softmax(-1)[..., :shared] @ table
        if scheme == "cascade+text":
            inputs["inputs_embeds"] = inputs["inputs_embeds"] + layer(batch["input_ids"])
    whole = value(**inputs).logits
    logits = whole[:, :-1]
    keep = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][keep]
    terms = residual_terms(base_logits[:, :-1][keep], logits[keep], labels, norm)
    sums = sum_terms(terms, labels, weight)
    if not everywhere:
        return sums
    rows = [
        whole[i, j, : base_logits.shape[-1]] for i, j in batch["attention_mask"].nonzero().tolist() if keep[i].any()
    ]
    sizes = [row.abs().mean() if norm == "l1" else row.square().mean() for row in rows]
    size = torch.stack(sizes).sum()
    total = terms.ce.sum() + weight * len(labels) / len(sizes) * size
    return sums._replace(total=total, norm=size.detach(), positions=torch.tensor(float(len(sizes))))


def gradients(value, total):
    value.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in value.named_parameters() if p.grad is not None}


def assert_same(value, sums, expected):
    """Values and gradients of two losses of one network."""
    torch.testing.assert_close(torch.stack(sums).detach(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    wanted, found = gradients(value, expected.total / 7), gradients(value, sums.total / 7)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
