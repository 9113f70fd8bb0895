"""What the value network reads; all schemes add its output to the base's logits.

    residual        z(x) = B0(x) + V(x)                                 V reads the tokens
    cascade         z(x) = B0(x) + V(e),  e_t = softmax(B0(x)_t) · E_V   V reads what the base expects to come next
    cascade+text    z(x) = B0(x) + V(e),  e_t = softmax(B0(x)_t) · E_V + E_V[x_t]

(Lu et al., NAACL 2025, arXiv 2410.21027.) The softmax is over all columns of the base; the columns that both networks
have take part in the product. E_V is what the value network's input-embedding layer returns for each token, so a layer
that scales counts as scaling, and E_V is trained through the product too. `serving.cascade` computes the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ivl_vllm.training.chunked_loss import CHUNK, BaseLogits, Shape
from ivl_vllm.training.ivl_config import SCHEMES


def reads_base(scheme: str) -> bool:
    """Whether the value network reads the base's expectation.

    Raises:
        ValueError: `scheme` is none of `SCHEMES`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(SCHEMES)}")
    return scheme != "residual"


class _ExpectedEmbedding(torch.autograd.Function):
    """softmax(base) · table in chunks; the backward pass computes the probabilities again instead of keeping them."""

    @staticmethod
    def forward(ctx, table, base_logits, base_columns, rows, options):
        chunk, dtype = options
        ctx.base_logits, ctx.rows, ctx.chunk, ctx.dtype = base_logits, rows, chunk, dtype
        ctx.table, ctx.shared = table.shape, min(base_columns, table.shape[0])
        ctx.table_dtype = table.dtype
        shared = table[: ctx.shared].to(dtype)
        expected = table.new_empty(rows, table.shape[1])
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            expected[start:stop] = _probabilities(base_logits(start, stop), ctx.shared).to(dtype) @ shared
        return expected

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        table = torch.zeros(ctx.table, dtype=torch.float32, device=gradient.device)
        for start in range(0, ctx.rows, ctx.chunk):
            stop = min(start + ctx.chunk, ctx.rows)
            probabilities = _probabilities(ctx.base_logits(start, stop), ctx.shared).to(ctx.dtype)
            table[: ctx.shared] += probabilities.t() @ gradient[start:stop].to(ctx.dtype)
        return table.to(ctx.table_dtype), None, None, None, None


def _probabilities(logits: torch.Tensor, columns: int) -> torch.Tensor:
    return logits.softmax(-1)[:, :columns]


def expected_embedding(
    table: torch.Tensor, base_logits: BaseLogits, base_columns: int, rows: int, chunk: int = CHUNK
) -> torch.Tensor:
    """`softmax(B0) · E_V`: the value network's embedding of the next token, in the base's expectation.

    Args:
        table: E_V, [V_value, H].
        base_logits: Rows of the base's logits on demand; called again in the backward pass, so the same rows must be
            the same then.
        base_columns: V_base.
        rows: N, the number of positions.
        chunk: Rows of logits that exist at a time.

    Returns:
        [N, H] in the dtype of `table`, differentiable in `table`.
    """
    device = table.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.dtype
    with torch.autocast(device, enabled=False):
        return _ExpectedEmbedding.apply(table, base_logits, base_columns, rows, (chunk, dtype))


def cascade_inputs(
    embed: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    tokens: int,
    base_logits: BaseLogits,
    base_columns: int,
    with_text: bool,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """What a cascade value network reads in the place of its token embeddings.

    Args:
        embed: The value network's own input-embedding layer, ids of any shape to [..., H].
        input_ids: [B, T], int64.
        tokens: V_value, how many tokens `embed` knows.
        base_logits: The base's logits at all B·T positions, row by row.
        base_columns: V_base.
        with_text: Add the embedding of the token itself (`cascade+text`).
        chunk: Rows of logits that exist at a time.

    Returns:
        [B, T, H].
    """
    table = embed(torch.arange(tokens, device=input_ids.device))
    expected = expected_embedding(table, base_logits, base_columns, input_ids.numel(), chunk)
    expected = expected.view(*input_ids.shape, -1)
    return expected + embed(input_ids) if with_text else expected


class Tap:
    """Takes over what one layer of a model computes, for the length of a block, from inside the model's own forward.

    There, and only there, the weights are whole and the gradients accounted for whatever wraps the model: DDP, FSDP,
    PEFT, gradient checkpointing. And no architecture has to be taken apart: what the output layer is given *is* the
    final hidden state.

    Args:
        layer: The layer; its hooks still run.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._work: Callable[..., Any] | None = None
        # One function for all steps, which a compiled model calls eagerly: a new one per step would recompile it.
        self._forward = torch.compiler.disable(lambda *args: self._work(*args))

    @contextmanager
    def doing(self, work: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Callable]:
        """Let `work` stand in for the layer's forward during the block.

        Yields:
            The layer's own forward.
        """
        before = self.layer.__dict__.get("forward")
        own = self.layer.forward
        self._work, self.layer.forward = work, self._forward
        try:
            yield own
        finally:
            self._work = None
            if before is None:
                del self.layer.forward
            else:
                self.layer.forward = before


def logit_shape(model: nn.Module) -> Shape | str:
    """What a model does to its output layer's numbers, so that its logits can be computed apart, a chunk at a time.

    Its configuration says how it scales or caps them. That is tried on the model itself: its output layer is made to
    return known numbers, and what comes out must be as told.

    Args:
        model: A causal LM with whole weights, not yet wrapped by DDP or FSDP.

    Returns:
        The shape, or the reason why whole logits are needed.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        # An adapter's or a quantised layer computes something else than its `weight` says.
        return f"its output layer is {'missing' if head is None else 'a ' + type(head).__name__}, no plain linear layer"
    calls = 0
    known = torch.linspace(-512, 512, head.out_features, device=head.weight.device, dtype=torch.float32)

    def answer(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return known.to(hidden.dtype).expand(*hidden.shape[:-1], -1)

    was_training = model.training
    model.eval()
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        with torch.no_grad(), Tap(head).doing(answer):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was_training)
    if calls != 1:
        return f"it calls its output layer {calls} times"
    for shape in (Shape(), _told_shape(model.config.get_text_config())):
        expected = shape(known.to(head.weight.dtype, copy=True)).expand_as(logits)
        if torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2):
            return shape
    return "it does more to its logits than to scale or to cap them"


def _told_shape(config: Any) -> Shape:
    """Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 has a soft cap."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Shape(scale, getattr(config, "final_logit_softcapping", None))
