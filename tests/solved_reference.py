"""The reference for weights that are solved at every token: float64, with SciPy, one row at a time."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from parity import Reference, Request
from PIL import Image
from scipy.optimize import brentq
from scipy.special import logsumexp

MAX_WEIGHT = 10.0
KINDS = [
    ({}, 0),
    ({"style": "auto"}, "auto:style"),
    ({"math": 1.0}, 1.0),
    ({"math": 1.0, "max_kl": 0.5}, "1.0;max_kl=0.5"),
    ({"math": -1.0, "style": 2.0, "max_kl": 2.0}, "math=-1.0,style=2.0;max_kl=2.0"),
    ({"other": "auto"}, "auto:other"),
    ({"math": 0.5, "max_kl": 100.0}, "math=0.5;max_kl=100"),  # never reached
    ({"style": "auto", "other": "auto"}, "auto:style,other"),
]


def solved_requests(count, seed, kinds=KINDS, spread=40):
    """Mixed prompts and arrivals; `kinds` one after the other. Some prompts share a prefix."""
    rng = random.Random(seed)
    prefix = [rng.randrange(4, 320) for _ in range(50)]
    requests = []
    for number in range(count):
        weights, ivl = kinds[number % len(kinds)]
        prompt = [rng.randrange(4, 320) for _ in range(rng.randrange(1, 50))]
        if rng.random() < 0.4:
            prompt = prefix + prompt[:5]
        requests.append(Request(prompt, weights, ivl, {"max_tokens": rng.randrange(2, 14)}, rng.randrange(spread)))
    return requests


def divergence(logits, from_logits):
    """KL(softmax(logits) ‖ softmax(from_logits)) in nats."""
    p, q = (x - logsumexp(x) for x in (logits, from_logits))
    return float((torch.from_numpy(p).exp().numpy() * (p - q)).sum())


def weight_at(base, delta, target, highest):
    """The weight in [0, highest] at which `base + weight * delta` has moved by `target` nats."""

    def excess(weight):
        return divergence(base + weight * delta, base) - target

    if target <= 0 or not delta.any():
        return 0.0 if delta.any() else highest
    return highest if excess(highest) <= 0 else brentq(excess, 0.0, highest, xtol=1e-10)


def joint_step(base, deltas, targets):
    """What several experts add together: the point that `ivl_kernels.joint_fusion_weights` documents."""
    shares = [weight_at(base, delta, target, MAX_WEIGHT) for delta, target in zip(deltas, targets)]
    mean = sum(targets) / len(targets)
    ray = sum(share * delta for share, delta in zip(shares, deltas))
    candidates = [(ray, MAX_WEIGHT / max(shares) if max(shares) else 0.0), *((delta, MAX_WEIGHT) for delta in deltas)]
    best, best_miss = ray, None
    for direction, highest in candidates:
        step = weight_at(base, direction, mean, highest) * direction
        reached = divergence(base + step, base)
        if best_miss is None or abs(reached - mean) < best_miss:
            best, best_miss = step, abs(reached - mean)
        if reached >= mean * (1 - 1e-4):
            break
    return best


class SolvedReference(Reference):
    """Takes `{name: "auto", ...}` and `{name: weight, ..., "max_kl": nats}` beside plain weights."""

    @torch.no_grad()
    def logits(self, ids: Sequence[int], weights: dict, images: Sequence[Image.Image] = ()) -> torch.Tensor:
        base = super().logits(ids, {}, images)
        rows = base.double().numpy()
        if "auto" in weights.values():
            deltas, targets = zip(*(self._pair(ids, name, base, images) for name in weights))
            if len(weights) > 1:
                steps = [
                    joint_step(row, [delta[i] for delta in deltas], [target[i] for target in targets])
                    for i, row in enumerate(rows)
                ]
                return base + torch.from_numpy(np.stack(steps)).float()
            (deltas,), (targets,), highest = deltas, targets, MAX_WEIGHT
        elif "max_kl" in weights:
            fixed = {name: weight for name, weight in weights.items() if name != "max_kl"}
            deltas = (super().logits(ids, fixed, images) - base).double().numpy()
            targets, highest = [weights["max_kl"]] * len(ids), 1.0
        else:
            return super().logits(ids, weights, images)
        steps = [weight_at(row, d, target, highest) * d for row, d, target in zip(rows, deltas, targets)]
        return base + torch.from_numpy(np.stack(steps)).float()

    def _pair(self, ids, name, base, images):
        """A pair's difference on the base's columns, float64 `[len(ids), vocab]`, and its own divergences."""
        delta = super().logits(ids, {name: 1.0}, images) - base
        known = self._known(name)
        if name not in self.maps:
            delta[:, known:] = 0.0  # columns that only one of the pair has
        return delta.double().numpy(), self._own_divergences(ids, name, known)

    def _known(self, name):
        """The columns that expert and anti-expert both have, padding of another vocabulary left out."""
        if name in self.maps:
            return self.maps[name].value_vocab
        return min(model.config.vocab_size for model, _ in self.values[name])

    def _own_divergences(self, ids, name, known):
        """How far the small expert has moved from its own base, at every position."""
        if name in self.maps:
            # Reads the base's tokens through the map; its columns are its own.
            logits = [self._read_through_map(model, ids, self.maps[name]) for model, _ in self.values[name]]
        else:
            inputs = torch.tensor([list(ids)])
            logits = [model(inputs.clamp(max=model.config.vocab_size - 1)).logits[0] for model, _ in self.values[name]]
        expert, anti = (part[:, :known].double().numpy() for part in logits)
        return [divergence(e, a) for e, a in zip(expert, anti)]
