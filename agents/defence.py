"""The defence interface: four hooks, and how an ordered list of defences composes.

Any learner here is the recursion

    B_t = Collect(F_t, pi_(theta_t, m)),    theta_(t+1) = Opt(theta_t, G(theta_t; B_t)),

with feedback F, forward mode m and gradient operator G. A defence can change theta_0 (``prepare``),
B_t (``feedback``), G (``backward``), or the mode and the weights outside G (``phase``); nothing
else is left to change, so nothing else is needed. A learner never knows which defence is active.

Composition of [D1, ..., Dn]: ``prepare`` and ``feedback`` run left to right, ``phase`` is entered
left to right and left in reverse, and in ``backward`` D1 is outermost: each sees, as ``run``, the
chain of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from agents.context import Context
from envs.registry import Registry
from envs.usage import UsageError

PHASES = ("rollout", "score", "update", "serve", "eval", "export")
CONSTRAINTS = (
    *("embedding", "weights", "reward", "loss", "representation", "meta-learned", "labels", "none"),
)
KINDS = ("offline", "additive", "turns", "perturbation")
"""Offline first, since later members anchor to what they leave; then, in ``backward``, additive
terms outermost, turn-takers inside them, perturbations of the learner's own loss innermost."""


LOG = {
    "log:gold": "gold questions (feedback.collection crowd with feedback.gold_share above 0)",
    "log:redundant": "several votes an item (feedback.collection crowd, feedback.redundancy >= 2)",
}
"""What a label log may hold beyond votes, by the name in ``needs``, and how a run comes by it."""
NOBODY = np.zeros(0, np.int64)


class Report(NamedTuple):
    """What one ``run`` measured: detached scalars. ``skipped`` when no gradient was made."""

    losses: dict[str, float]
    skipped: bool = False


Run = Callable[[], Report]


class StopLearning(Exception):
    """Raised by a defence to end the current round's learning; the policy stays as it is."""


class Defence:
    """Base of every defence; override any of the four hooks.

    Attributes:
        needs: data roles, ``score:<name>`` scorers and :data:`LOG` entries that must exist, checked
            before ``prepare``.
        targets: learners the hooks fire for, of ``"policy"`` and ``"reward_model"``.
        splits_serving: whether users must see another forward mode than the one that trains, so
            that PPO and GRPO sample again under ``rollout``.
        constraint: what it constrains, one of :data:`CONSTRAINTS`.
        offline: whether ``prepare`` is all of it, and leaves nothing behind but weights. Such
            defences are built once and shared by all runs.
        whole: whether it needs weights that are not trained through adapters. Under LoRA such a
            defence acts before the release, at the head of a list, or not at all.
        kind: place in a list that composes as its members are meant, one of :data:`KINDS`.
        cost: compute of one of the learner's steps against none; of offline defences, passes
            (forward and backward of a batch) in each of their own steps.
        paper: where it is from.
        off: arguments under which it is bitwise no defence; "" where it has no strength.
    """

    needs: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset({"policy"})
    splits_serving: bool = False
    constraint: str = "none"
    offline: bool = False
    whole: bool = False
    kind: str = "additive"
    cost: str = "1x"
    paper: str = ""
    off: str = ""
    registered: str = ""
    spec: str = ""

    @property
    def place(self) -> str:
        """Where it usually stands in a list, one of :data:`KINDS`."""
        return "offline" if self.offline else self.kind

    @property
    def label(self) -> str:
        """What messages and logs call it."""
        return self.registered or type(self).__name__

    @property
    def banned(self) -> np.ndarray:
        """(n,) ids of annotators whose votes it no longer lets in; recorded, and scored outside."""
        return NOBODY

    def prepare(self, ctx: Context) -> None:
        """Act once before the reference is snapshotted and the optimizer exists."""

    def feedback(self, ctx: Context, batch: Any) -> Any:
        """Return ``batch`` or a changed copy; must not touch parameters or gradients."""
        return batch

    @contextmanager
    def phase(self, ctx: Context, name: str) -> Iterator[None]:
        """Surround one use of the model; ``name`` is one of :data:`PHASES`.

        Phases nest: within ``update``, members form losses on what users get in ``serve``.
        """
        yield

    def backward(self, ctx: Context, run: Run) -> Report:
        """Make the gradients of one optimizer step; ``run`` accumulates the learner's own.

        A member further out may call this several times a step and take back what was drawn in
        between (``ctx.replay_rng``): counters belong into ``phase``.
        """
        return run()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the model's weights."""
        return {}

    def load_state_dict(self, ctx: Context, state: dict[str, Any]) -> None:
        """Recreate structure and anchors from ``state``; replaces ``prepare`` on resume."""


defences = Registry("defence", "agents.defences", Defence)


def order_warning(members: Sequence[Defence]) -> str | None:
    """What to say of a list that is not what it seems: an unusual order, or a member twice."""
    named = [d.spec for d in members if d.spec]
    if twice := sorted({spec for spec in named if named.count(spec) > 1}):
        return f"{', '.join(twice)} stands twice in the list, and acts twice"
    places = [KINDS.index(member.place) for member in members]
    for one, two, first, second in zip(members, members[1:], places, places[1:], strict=False):
        if first > second:
            return (
                f"{one.label} ({KINDS[first]}) stands before {two.label} ({KINDS[second]}); "
                f"lists usually go {', '.join(KINDS)}"
            )
    return None


def missing_needs(member: Defence, provided: Iterable[str]) -> list[str]:
    """What ``member`` needs beyond ``provided``, sorted.

    Raises:
        ValueError: its needs are no set of names.
    """
    if isinstance(member.needs, str):
        raise UsageError(
            f"defence {member.label}: needs={member.needs!r}; "
            f"allowed: a set of names, such as frozenset({{{member.needs!r}}})"
        )
    return sorted(frozenset(member.needs) - frozenset(provided))


def in_words(needs: Iterable[str]) -> str:
    """Names of needs; those that are of the label log with what provides them."""
    return ", ".join(f"{name}: {LOG[name]}" if name in LOG else name for name in needs)


def _reported(member: Defence, ctx: Context, run: Run) -> Report:
    """What ``backward`` of ``member`` returns, which must be a report."""
    report = member.backward(ctx, run)
    if not isinstance(report, Report):
        raise UsageError(
            f"defence {member.label}: backward returned {report!r}; "
            "allowed: a Report, such as the one that run() gives"
        )
    return report


class DefenceStack:
    """An ordered list of defences acting on one learner.

    Args:
        members: the run's defences, built for this learner alone, since they keep state; those
            that do not target ``ctx.learner`` are left out.
        ctx: the learner's context.
        acting: False when the attacker runs the training loop: only ``prepare`` has acted then.

    Attributes:
        places: where each member stands in the run's list.
    """

    def __init__(self, members: Sequence[Defence], ctx: Context, acting: bool = True):
        self.ctx = ctx
        self.places = [i for i, d in enumerate(members) if ctx.learner in d.targets]
        self.members = [members[i] for i in self.places]
        self.acting = self.members if acting else []
        ctx.phase = self.phase

    @property
    def splits_serving(self) -> bool:
        """Whether any member needs separate rollouts."""
        return any(d.splits_serving for d in self.acting)

    @property
    def has_phases(self) -> bool:
        """Whether any acting member treats the uses of the model differently."""
        return any(type(d).phase is not Defence.phase for d in self.acting)

    def check_needs(self) -> None:
        """Refuse defences that cannot act here.

        Raises:
            ValueError: a defence needs a data role or scorer that this run does not have.
        """
        for member in self.members:
            missing = missing_needs(member, self.ctx.provides)
            if missing:
                raise UsageError(
                    f"defence {member.spec or type(member).__name__}: needs {in_words(missing)}; "
                    f"this run has {', '.join(sorted(self.ctx.provides)) or 'none'}"
                )

    def prepare(self) -> None:
        """Prepare left to right, once all needs are known to be met."""
        self.check_needs()
        for member in self.members:
            member.prepare(self.ctx)

    def feedback(self, batch: Any) -> Any:
        """The left-to-right pipeline of ``feedback`` hooks."""
        for member in self.acting:
            batch = member.feedback(self.ctx, batch)
        return batch

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """All phase contexts, entered left to right."""
        assert name in PHASES, name
        with ExitStack() as stack:
            for member in self.acting:
                stack.enter_context(member.phase(self.ctx, name))
            yield

    def backward(self, run: Run) -> Report:
        """The chain of ``backward`` hooks around the learner's own ``run``."""
        for member in reversed(self.acting):
            run = partial(_reported, member, self.ctx, run)
        return run()

    def state_dict(self) -> list[dict[str, Any]]:
        """States in list order."""
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore every member, in order; their tensors come back on the model's device."""
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(self.ctx, _on(self.ctx.device, state))


def _on(device: torch.device, state: Any) -> Any:
    """Nested ``state`` with its tensors on ``device``."""
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {name: _on(device, value) for name, value in state.items()}
    return [_on(device, value) for value in state] if isinstance(state, list) else state
