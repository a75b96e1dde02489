"""The state of a run, made into the state that its fork begins with.

What is not asked to change goes on as it is: policy, optimizer moments, reward model, labels in the
window, answers that wait for votes, the monitor's evidence, all clocks. What does change begins
anew, from the policy as it is at the fork:

    defences   the whole list is prepared again, at the weights that users get at the fork, also by
               members that were in it before; their draws of role data begin anew
    learner    fresh optimizer, value heads and KL coefficient, if any of its fields is another
    reward model   where the parent had none: as at the beginning of a run, then trained on the
               labels that the window holds

The reference policy is the parent's: what KL is measured from, and penalised against, is the same
on both branches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.adapters import exported, load_plain
from envs.attacks.early_stopping import StopRule
from sim.config import Config
from sim.factory import Start, make_agent
from sim.scenario import Scenario

State = dict[str, Any]
Weights = dict[str, Tensor]


def forked_state(parent: Config, config: Config, scenario: Scenario, state: State) -> State:
    """What the fork's first checkpoint holds.

    Args:
        parent: the config under which ``state`` came to be.
        config: the fork's; it differs in attack, learner, defences and rounds alone.
        scenario: of both.
        state: of the parent, whole, at the round of the fork.
    """
    forked = {**state, "agent": _agent(parent, config, scenario, state["agent"])}
    if config.attack != parent.attack:
        forked.pop("early_stop", None)  # another attacker, who has seen nothing yet
        if "detection" in forked:  # evidence about people stays; whom to find is another question
            forked["detection"] = {**forked["detection"], "found": {}}
    if config.attack.name != parent.attack.name:
        forked["env"] = {k: v for k, v in forked["env"].items() if k != "attack"}
    if config.attack.stop_at:
        forked.setdefault("early_stop", StopRule(config.attack.stop_at).state_dict())
    return forked


def _agent(parent: Config, config: Config, scenario: Scenario, old: State) -> State:
    """The agent's part of the state."""
    learner, defences = config.learner == parent.learner, config.defences == parent.defences
    if defences:
        agent = make_agent(config, scenario, start=Start(defences=old["defences"]))
    else:
        plain, reference = _plain(parent, scenario, old)
        weights = {"policy": plain}
        if "reward_model" in old:
            weights["reward_model"] = old["reward_model"]
        agent = make_agent(config, scenario, start=Start(weights))
        assert agent.policy.reference is not None
        load_plain(agent.policy.reference, reference)
    new = agent.state_dict()
    agent.close()
    return _merged(old, new, learner, defences)


def _plain(parent: Config, scenario: Scenario, old: State) -> tuple[Weights, Weights]:
    """Policy and reference without what the parent's defences put into them."""
    agent = make_agent(parent, scenario, old)
    assert agent.policy.reference is not None
    with agent.stack.phase("export"):
        plain, reference = (exported(m)[0] for m in (agent.policy.model, agent.policy.reference))
    agent.close()
    return plain, reference


def _merged(old: State, new: State, learner: bool, defences: bool) -> State:
    """``new`` with what goes on from ``old``: the ``learner`` as it was, the ``defences``."""
    shared = "reward_model" in old and "reward_model" in new
    kept = ["round", "replay", "served"]
    kept += ["learner"] * learner + ["policy", "reference"] * defences
    kept += ["reward_learner"] * shared + ["reward_model"] * (shared and defences)
    contexts = {}
    for name, fresh in new["contexts"].items():
        before = old["contexts"].get(name, fresh)
        moments = before if learner or name == "reward_model" else fresh
        drawn = before if defences else fresh
        contexts[name] = {
            "step": before["step"],
            "optimizer": moments["optimizer"],
            "rng": drawn["rng"],
            "drawn": drawn["drawn"],
        }
    states = new["defences"]
    if defences:
        states = {name: old["defences"].get(name, state) for name, state in states.items()}
    going_on = {name: old[name] for name in kept}
    return {**new, **going_on, "contexts": contexts, "defences": states}
