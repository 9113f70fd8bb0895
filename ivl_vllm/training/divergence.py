"""Notices a run that diverges, at every step, without making a step wait for the device."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ivl_vllm.training.folders import list_checkpoints

_LOSS, _GRADIENT = 0, 1
_NAMES = ("the loss is", "the gradients are")


class TrainingDivergedError(RuntimeError):
    """Loss, gradients or weights are no longer finite; the message says what is kept and what to change."""


class StopsDiverged(Trainer):
    """The part of the trainer that stops a run whose loss, gradients or weights are not finite.

    Each step leaves marks on the device. They are read one step later, when the device has long been done with that
    step, and before each evaluation and each saving. So a run goes on for one step at most, and nothing is saved
    after a broken step. Several processes stop together: of the marks that are read at each step they heed only that
    of the gradients, which they share.
    """

    # First step whose loss or whose gradients were not finite, [2] int64 on the device; 0 for none.
    _first_broken: torch.Tensor | None = None
    _a_step_ago: torch.Tensor | None = None

    def watch_loss(self, loss: torch.Tensor) -> None:
        """Mark the step that is being made where its loss, a scalar, is not finite."""
        self._watch(_LOSS, loss)

    def _watch(self, which: int, value: torch.Tensor | float) -> None:
        if self._first_broken is None:
            self._first_broken = torch.zeros(2, dtype=torch.long, device=self.args.device)
        mark = self._first_broken[which]
        is_new = ~torch.isfinite(torch.as_tensor(value, device=mark.device).detach()) & (mark == 0)
        mark.masked_fill_(is_new, self.state.global_step + 1)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if self._a_step_ago is not None:
            marks = self._a_step_ago.tolist()
            for which in (_GRADIENT, _LOSS) if self.accelerator.num_processes == 1 else (_GRADIENT,):
                if marks[which]:
                    self.stop_diverged(f"{_NAMES[which]} not finite", marks[which])
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 the gradients overflow now and then, and the scaler leaves out such a step.
        if not self.args.fp16:
            whole = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            self._watch(_GRADIENT, whole)
        self._a_step_ago = None if self._first_broken is None else self._first_broken.clone()
        return grad_norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers has it, but not of broken weights."""
        self.check_finite()
        return super().evaluate(*args, **kwargs)

    def check_finite(self) -> None:
        """Refuse to go on, on every process at once, after a broken step of any or with broken weights on any.

        Raises:
            TrainingDivergedError: With the last good checkpoint.
        """
        device = self.args.device
        marks = torch.zeros(2, dtype=torch.long, device=device) if self._first_broken is None else self._first_broken
        local = (getattr(p, "_local_tensor", p) for p in self.model.parameters())
        broken = sum((~torch.isfinite(p.detach()).all()).long() for p in local)
        found = torch.cat([marks, torch.as_tensor(broken, dtype=torch.long, device=device).view(1)])
        found = self.accelerator.gather(found[None])
        for which in (_LOSS, _GRADIENT):
            steps = found[:, which]
            if steps.any():
                self.stop_diverged(f"{_NAMES[which]} not finite", int(steps[steps > 0].min()))
        if found[:, 2].any():
            self.stop_diverged("weights are not finite")

    def stop_diverged(self, what: str, step: int | None = None) -> None:
        """Raise the error that tells what is kept.

        Args:
            what: What is not finite.
            step: Since which step; left out, the present one.
        """
        kept = list_checkpoints(Path(self.args.output_dir))
        tale = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written"
        raise TrainingDivergedError(
            f"training diverged: {what} at step {self.state.global_step if step is None else step}; {tale}. "
            "Lower --learning_rate, lengthen --warmup_steps or lower --max_grad_norm"
        )
