"""What may be asked of evaluations, and which of it makes another run."""

import pytest

from sim.config import Config, EvaluationConfig
from sim.evaluation_config import stopped_by
from sim.identity import identity

TOLD = "chance_cost chance_limit cvar_share cvar_limit pointwise_limit hacked_share".split()


@pytest.mark.parametrize("field", [*TOLD, "sustained"])
def test_fields_out_of_range_are_named(field):
    for value in (0, -1, 1.5 if field != "sustained" else -2):
        with pytest.raises(ValueError, match=rf"evaluation\.{field}=.*allowed"):
            EvaluationConfig(**{field: value})


def test_what_is_only_told_makes_no_other_run():
    """Runs recorded before these fields existed are the same runs as now."""
    plain = Config().to_dict()
    older = {**plain, "evaluation": {k: v for k, v in plain["evaluation"].items() if k not in
                                     (*TOLD, "sustained", "stop_on_sustained")}}  # fmt: skip
    other = Config(evaluation=EvaluationConfig(cvar_limit=0.7, sustained=5)).to_dict()
    assert identity(plain) == identity(older) == identity(other)
    stops = [EvaluationConfig(stop_on_sustained=True, sustained=k) for k in (3, 5)]
    texts = {identity(Config(evaluation=stop).to_dict()) for stop in stops}
    assert len(texts) == 2 and identity(plain) not in texts


@pytest.mark.parametrize(
    ("exit", "sustained", "found"),
    [(True, False, "confirmed"), (False, True, "sustained"), (True, True, "confirmed"),
     (False, False, None)],
)  # fmt: skip
def test_the_exit_that_ends_a_run(exit, sustained, found):
    chosen = EvaluationConfig(stop_on_exit=exit, stop_on_sustained=sustained)
    assert stopped_by(chosen, confirmed={"rounds": 1}, sustained={"rounds": 2}) == found
    assert stopped_by(chosen, confirmed=None, sustained=None) is None
