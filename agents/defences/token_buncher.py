"""TokenBuncher: leave reinforcement learning no uncertainty to choose from (Feng et al. 2025).

    GRPO on harmful prompts:   r = - mean_t H(pi(. | x, y_<t)) - astray [no refusal]
    Token Noiser:   L_noise = CE( softmax(z + sigma n), softmax(z) )   over the non-target tokens

z are the logits where an answer's tokens were drawn, n ~ N(0, 1) is fresh for every logit and step,
and the target softmax(z + sigma n) is held fixed. Both distributions leave out the token that was
drawn, so the noise does not touch how certain the model is, only what it falls back on: an attacker
who raises entropy again finds noise there instead of an answer that was second best. The paper
describes entropy reward and noise; the weights, sigma and this renormalised form are ours.

So is ``astray``. Low entropy does not ask for a refusal: where a harmful answer is surer per token
than the varied refusals, as recipes are, the bare reward (``astray=0``) unlearns refusing. Whether
an answer refuses is told by its opening, as in ``reward_neutralization``. A language-model loss on
retained answers keeps the rest. Attacks that bring their own text are not touched.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.batches import Sequences
from agents.context import Context
from agents.defence import defences
from agents.defences.reward_neutralization import opening, opens_with
from agents.offline import OfflineDefence
from agents.policy import TILE, response_states
from agents.policy_gradient import accumulate_policy_gradient, sample_groups, token_entropy
from envs.usage import check_ranges


@defences.register("token_buncher")
class TokenBuncher(OfflineDefence):
    """Trains certainty on harmful prompts by GRPO, with noise in place of second choices.

    Args:
        steps: optimizer steps, >= 0; 0 is bitwise no defence.
        lr: peak learning rate, 0 to 1.
        batch: harmful prompts, and retained answers, per step.
        group: answers to each harmful prompt, >= 2.
        noise: weight of the Token Noiser, >= 0.
        sigma: standard deviation of its noise in logits, >= 0.
        astray: what an answer costs that opens like no refusal, in nats per token, >= 0; 0 is the
            authors' reward.
        retain: weight of the loss on retained answers, >= 0.
    """

    needs = frozenset({"harm_prompts", "refusal", "retain"})
    constraint, cost = "reward", "group + 2 passes a step, answers sampled"
    paper = "Feng et al. 2025"
    off = "steps=0"

    def __init__(
        self,
        steps: int = 100,
        lr: float = 5e-4,
        batch: int = 16,
        group: int = 8,
        noise: float = 0.1,
        sigma: float = 2.0,
        astray: float = 1.0,
        retain: float = 1.0,
    ):
        super().__init__(steps, lr, batch)
        self.group, self.noise, self.sigma = group, noise, sigma
        self.astray, self.retain = astray, retain
        weights = {"noise": ">= 0", "astray": ">= 0", "retain": ">= 0"}
        check_ranges(self, f"{self.label}.", group=">= 2", sigma=">= 0", **weights)

    def gradient(self, ctx: Context, step: int) -> float:
        """One GRPO step towards certainty, the Token Noiser, and the loss on retained answers."""
        answers = sample_groups(ctx, ctx.data["harm_prompts"].next(self.batch), self.group)
        total = accumulate_policy_gradient(ctx, answers, self.rewards(ctx, answers), self.group)
        one_each = answers.take(torch.arange(0, len(answers), self.group))
        seed = int(torch.randint(2**62, (), generator=ctx.rng))
        loss = self.noise * token_noiser_loss(ctx.model, one_each, self.sigma, seed)
        loss = loss + self.retain * ctx.lm_loss(ctx.data["retain"].next(self.batch))
        loss.backward()
        return total + float(loss.detach())

    def rewards(self, ctx: Context, answers: Sequences) -> Tensor:
        """(N,) rewards of ``answers`` of the live model."""
        entropy = token_entropy(ctx.model, answers, ctx.temperature).sum(1)
        refusals = cast(Sequences, ctx.data["refusal"].sequences)
        refused = opens_with(answers, opening(refusals).unique(dim=0))
        return -entropy / answers.mask.sum(1).clamp(min=1) - self.astray * ~refused


def token_noiser_loss(model: nn.Module, sequences: Sequences, sigma: float, seed: int) -> Tensor:
    """Mean cross-entropy of the non-target distributions with their own noised selves."""
    said = sequences.mask.bool()
    states, ids = response_states(model, sequences)[said], sequences.ids[said]
    head = model.get_output_embeddings()
    rows = max(1, TILE // head.weight.shape[0])

    def tile(states: Tensor, ids: Tensor, seed: int) -> Tensor:
        rest = head(states).float().scatter(1, ids[:, None], -torch.inf)
        generator = torch.Generator(rest.device).manual_seed(seed)  # equal noise if formed again
        noise = torch.randn(rest.shape, generator=generator, device=rest.device)
        target = (rest.detach() + sigma * noise).softmax(-1)
        logp = rest.log_softmax(-1).scatter(1, ids[:, None], 0.0)
        return -(target * logp).sum()

    parts = zip(states.split(rows), ids.split(rows), strict=True)
    if len(ids) <= rows:
        return tile(states, ids, seed) / len(ids)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    sums = [checkpoint(tile, *part, seed + i, **again) for i, part in enumerate(parts)]
    return torch.stack(sums).sum() / len(ids)
