"""The map of ratios: twins, numbers, colours."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sim.analysis.heat_map import plot_heat_map, ratio_table
from tests.sim.test_analysis import drawn_text
from tests.sim.test_time_by_rho import design, made


def tile(panel, x: int, y: int) -> tuple[float, ...]:
    """Colour of a cell."""
    (patch,) = [p for p in panel.patches if (p.get_x(), p.get_y()) == (x - 0.5, y - 0.5)]
    return to_rgb(patch.get_facecolor())


def test_ratios_by_hand():
    table = ratio_table(design()).set_index(["learner", "defence", "rho"])
    assert table.loc[("grpo", "lisa", 0.2), "ratio"] == pytest.approx(20 / 13)
    assert table.loc[("grpo", "lisa", 0.8), "ratio"] == pytest.approx(2)
    assert (table.xs("no defence", level="defence")["ratio"] == 1).all()
    on_steps = ratio_table(design(), "optimizer_steps").set_index(["learner", "defence", "rho"])
    assert on_steps.loc[("grpo", "lisa", 0.8), "ratio"] == pytest.approx(2)
    assert on_steps.loc[("grpo", "lisa", 0.8), "horizon"] == 80


def test_longer_is_blue_and_shorter_red():
    runs = [made(0.2, 5), made(0.2, 20, ("lisa",)), made(0.2, 2, ("tar",)), made(0.0, None)]
    ax = plot_heat_map(runs)
    (panel,) = ax.child_axes
    assert [text.get_text() for text in panel.texts[::2]] == ["5", "×4.0", "×0.40"]
    assert [text.get_text() for text in panel.texts[1::2]] == ["1/1"] * 3
    assert [label.get_text() for label in panel.get_xticklabels()] == ["ρ = 0.2"], "no clean cell"
    (red, _, blue), (more, _, less) = tile(panel, 0, 2), tile(panel, 0, 1)
    assert red > blue and less > more and tile(panel, 0, 0) == (1, 1, 1)
    assert "n = 1" in drawn_text(ax) and "label_noise" in drawn_text(ax)


def test_without_a_twin_the_mean_itself_is_shown():
    alone = made(0.8, 10, ("lisa",))
    runs = [made(0.2, 5), made(0.2, None, ("lisa",)), alone]
    ax = plot_heat_map(runs)
    words = [text.get_text() for text in ax.child_axes[0].texts]
    assert "10" in words and "no undefended twin" in drawn_text(ax)
    assert len(set(tile(ax.child_axes[0], 1, 1))) == 1, "grey"
    with pytest.raises(ValueError, match="no defended run under attack"):
        plot_heat_map([made(0.2, 5), made(0.0, None, ("lisa",))])


def test_an_unknown_mean_has_no_colour():
    gone = made(0.2, None, ("lisa",), rounds=20)
    gone = type(gone)(gone.path, gone.manifest, gone.summary, gone.rounds[:6])  # ended early
    panel = plot_heat_map([made(0.2, 5), gone]).child_axes[0]
    assert "?" in [text.get_text() for text in panel.texts]
    assert tile(panel, 0, 1) == (1, 1, 1)
    assert np.isnan(ratio_table([made(0.2, 5), gone])["ratio"].iloc[1])
