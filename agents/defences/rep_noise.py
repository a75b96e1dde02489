"""RepNoise: make harmful representations noise at every depth (Rosati et al. 2024).

    L = CE_M(refusal) + beta * mean_l MMD(mlp_l * M, xi_l * M) - alpha * log(1 + L_ascent)

M are the tokens where harmful and refusing answer to one prompt differ, xi_l is standard normal,
and a sequence is one long vector to the MMD. All of it is a setting of
``representation_removal``; see there for the ascent and its bound.

Set apart from the release: ignored tokens are left out rather than turned into uniform logits, no
token id means padding, no noise is put on padding, and the last state passes the final norm once.
The MMD has no scale and a floor of (2/n)(5 - 1.9069) over n sequences, 1.5 at 4 and .19 at 32:
read its fall against that. Results hinge on lr, alpha, beta and the amount of data together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agents.batches import Pairs
from agents.defence import defences
from agents.defences.representation_removal import (
    RepresentationRemoval,
    gaussian_noise,
    removal_loss,
)
from agents.distances import mmd


def rep_noise_loss(
    model: nn.Module, pairs: Pairs, alpha: float, beta: float, generator: torch.Generator
) -> Tensor:
    """Refusals kept, harmful MLP outputs driven to noise, harmful text made unlikely.

    Args:
        model: being trained.
        pairs: harmful and refusing answers to the same prompts.
        alpha: strength of the bounded ascent; 0 leaves it out.
        beta: strength of the noise term; 0 leaves it out and draws nothing.
        generator: of the noise.
    """
    return removal_loss(model, pairs, alpha, beta, gaussian_noise(generator), mmd)


@defences.register("rep_noise")
class RepNoise(RepresentationRemoval):
    """Trains harmful MLP outputs to be Gaussian noise and harmful text unlikely at every depth.

    Args:
        alpha: strength of the ascent, >= 0 (1 in the paper).
        beta: strength of the noise term, >= 0 (0.001 in the paper).
        layers: decoder layers counted from 1; () is all.
        retain: weight of the loss on benign answers, >= 0 (0 in the paper).
        steps: optimizer steps (877 of batch 8 in the paper); 0 is bitwise no defence.
        lr: peak learning rate (4e-5 in the paper, for billions of weights).
        batch: pairs per step, 8 or more for the MMD to mean anything.
    """

    paper = "Rosati et al. 2024"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        layers: tuple[int, ...] = (),
        retain: float = 1.0,
        steps: int = 300,
        lr: float = 1e-4,
        batch: int = 32,
    ):
        shared: Any = {"retain": retain, "steps": steps, "lr": lr, "batch": batch}
        super().__init__("noise", "mmd", alpha, beta, layers, "mlp", **shared)
