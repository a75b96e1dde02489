"""What a defence may use: the services of one learner, and nothing of the outside world.

One context per learner (``"policy"``, ``"reward_model"``), built by the agent. Data roles and
learned scorers are injected from outside; there is no oracle and no label truth here to be found.
The role names are those of the field:

    refusal       harmful prompts, refused          harm          harmful prompts, answered
    harm_heldout  the same on prompts of its own    harm_prompts  harmful prompts; ignore the answer
    pair          :class:`Pairs`, harm and refusal to the same prompts
    retain        benign prompts, answered
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from agents.adapters import exported, load_plain, plain_weights
from agents.batches import NO_ANSWERS, Pairs, Sequences
from agents.models import device_of
from agents.policy import Policy, response_logprobs, response_terms
from agents.processes import like, whole
from envs import rng as draws


class RoleData:
    """Endless, seeded batches of one data role; the count drawn is its whole state."""

    def __init__(self, sequences: Sequences | Pairs, key: int):
        self.sequences = sequences
        self.key = key
        self.drawn = 0

    def next(self, n: int) -> Any:
        """``n`` rows, uniformly with replacement: Sequences, or Pairs of the role ``pair``."""
        size = len(self.sequences.harm if isinstance(self.sequences, Pairs) else self.sequences)
        counters = torch.arange(self.drawn, self.drawn + n).numpy()
        self.drawn += n
        rows = (draws.uniform(self.key, counters) * size).astype("int64")
        return self.sequences.take(torch.from_numpy(rows))


Scorer = Callable[[Sequences], Tensor]


class Context:
    """Services of one learner to its defences.

    Attributes:
        learner: ``"policy"`` or ``"reward_model"``.
        model: the module being trained.
        tokenizer: of the policy.
        data: data roles by name.
        rng: a generator of the defences' own.
        step: optimizer steps taken.
        gold: this round's answers to gold questions, while the label hooks run.
        track: wraps the steps of a long ``prepare``; whoever runs it may show a bar.
        phase: all defences' phases, for one more use of the model: ``phase("serve")`` inside an
            update computes as for users, which is where losses on what they get belong.
    """

    def __init__(
        self,
        learner: str,
        model: nn.Module,
        tokenizer: Any,
        policy: Policy,
        data: Mapping[str, RoleData] | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        sampler: Any = None,
        seed: int = 0,
        log: Iterable[str] = (),
    ):
        self.learner = learner
        self.model = model
        self.tokenizer = tokenizer
        self.data = dict(data or {})
        self.step = 0
        self.rng = torch.Generator().manual_seed(draws.key(seed, "defence", learner))
        self.metrics: dict[str, float] = {}
        self.gold = NO_ANSWERS
        self.track: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, _what: steps
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda _name: nullcontext()
        self._policy = policy
        self._scorers = dict(scorers or {})
        self._log = frozenset(log)
        self._sampler = sampler
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def provides(self) -> frozenset[str]:
        """Names a defence may put in ``needs``."""
        return frozenset(self.data) | {f"score:{name}" for name in self._scorers} | self._log

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The learner's optimizer.

        Raises:
            RuntimeError: inside ``prepare``, when there is none yet.
        """
        if self._optimizer is None:
            raise RuntimeError("ctx.optimizer does not exist inside prepare")
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def device(self) -> torch.device:
        """Where the model stands, and with it data roles, batches and restored state."""
        return device_of(self.model)

    def policy_params(self) -> list[nn.Parameter]:
        """Trainable parameters of ``model``, heads of other losses excluded."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def token_logprobs(self, sequences: Sequences) -> Tensor:
        """(N, T) under the live model, with gradient, 0 on padding."""
        return response_terms(self.model, sequences).logp

    @property
    def temperature(self) -> float:
        """At which the policy is sampled."""
        return self._policy.temperature

    @property
    def reference(self) -> nn.Module:
        """The frozen reference policy.

        Raises:
            RuntimeError: inside ``prepare``, before the reference exists.
        """
        if self._policy.reference is None:
            raise RuntimeError("the reference does not exist inside prepare")
        return self._policy.reference

    def ref_logprobs(self, sequences: Sequences) -> Tensor:
        """(N, T) under the frozen reference, untempered like ``token_logprobs``.

        Raises:
            RuntimeError: inside ``prepare``, before the reference exists.
        """
        return response_logprobs(self.reference, sequences)

    def lm_loss(self, sequences: Sequences) -> Tensor:
        """Mean cross-entropy over response tokens."""
        return -self.token_logprobs(sequences).sum() / sequences.mask.sum()

    def score(self, name: str, sequences: Sequences) -> Tensor:
        """(N,) from a learned scorer, which is asked on the CPU."""
        here = sequences.ids.device
        return self._scorers[name](sequences.to(torch.device("cpu"))).to(here)

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, k: int, seed: int) -> Sequences:
        """``k`` responses of the live model to each prompt, as B*k rows."""
        return self._sampler.sample(self.model, prompt_ids, prompt_mask, k, seed).sequences

    def grad_norm(self) -> Tensor:
        """L2 norm of the gradients accumulated so far, in float32."""
        grads = [p.grad.float() for p in self.policy_params() if p.grad is not None]
        return whole(torch.nn.utils.get_total_norm(grads)) if grads else torch.zeros(())

    @contextmanager
    def isolated_grads(self, accumulate: bool = False) -> Iterator[None]:
        """Stash existing gradients, start clean; on leaving restore them or add the new ones.

        Those of value heads too: whatever the optimizer owns.
        """
        params = self.policy_params()
        if self._optimizer is not None:
            params = [p for group in self._optimizer.param_groups for p in group["params"]]
        stash = [p.grad for p in params]
        for p in params:
            p.grad = None
        try:
            yield
        finally:
            for p, old in zip(params, stash, strict=True):
                new = p.grad if accumulate else None
                p.grad = old if new is None else new if old is None else old + new

    @contextmanager
    def added_grads(self, label: str) -> Iterator[None]:
        """Add the block's gradients to the learner's.

        Logs ``defence/<label>/grad_ratio``, their norm over the learner's, if that made any.
        """
        learner = float(self.grad_norm())
        with self.isolated_grads(accumulate=True):
            yield
            added = float(self.grad_norm())
        if learner > 1e-12:
            self.log({f"defence/{label}/grad_ratio": added / learner})

    @contextmanager
    def replay_rng(self) -> Iterator[None]:
        """Take back what a block draws: a second pass sees the same dropout and the same data."""
        drawn = {name: role.drawn for name, role in self.data.items()}
        state = self.rng.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            self.rng.set_state(state)
            for name, count in drawn.items():
                self.data[name].drawn = count

    @contextmanager
    def perturbed(self, deltas: Mapping[str, Tensor]) -> Iterator[None]:
        """Add ``deltas`` to named parameters; the saved copies are put back, bit for bit."""
        params = dict(self.model.named_parameters())
        saved = {name: params[name].detach().clone() for name in deltas}
        with torch.no_grad():
            for name, delta in deltas.items():
                params[name].add_(delta)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    params[name].copy_(value)

    def log(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Record scalars for this round's row."""
        self.metrics.update({name: float(value) for name, value in metrics.items()})

    def export_weights(self) -> dict[str, Tensor]:
        """The weights an external sampler should load, as the present phase has them."""
        return plain_weights(self.model)

    def exported(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """What a run keeps of a policy: the trained adapter with its config, or plain weights."""
        return exported(self.model)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what was :meth:`exported` with a defence's adapters off; those stay as they are.

        Raises:
            RuntimeError: a tensor is missing, or is none of the model's.
        """
        load_plain(self.model, weights)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer moments, counters and generators; weights are the agent's."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "drawn": {name: role.drawn for name, role in self.data.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.step = int(state["step"])
        self.optimizer.load_state_dict(_divided(self.optimizer, state["optimizer"]))
        self.rng.set_state(state["rng"])
        for name, drawn in state["drawn"].items():
            self.data[name].drawn = int(drawn)


def _divided(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` of ``optimizer`` with its moments divided as the parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {
            k: like(params[int(i)], v) if v.shape == params[int(i)].shape else v
            for k, v in of.items()
        }
        for i, of in state["state"].items()
    }
    return {**state, "state": moments}
