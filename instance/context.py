"""How a model's layers reach the step that runs."""

import threading
from typing import Any

import torch

from instance.fused import FeedSharing, LayerAttention
from instance.team import Team


class AttentionContext(threading.local):
    """The one object through which the model's attention layers reach the present step. Bound to each layer at load.

    Every thread has a step of its own.
    """

    def __init__(self, team: Team | None = None) -> None:
        """Each thread calls it at its first use. `team`: what it begins with, where the model is one rank's part."""
        self.team = team

    attention: LayerAttention | None = None
    sharing: FeedSharing | None = None
    """Other instances that compute a part of the present step's feeds, and this one of theirs; None: all is computed here."""
    hidden: Any = None
    """What the layers shall seem to have computed."""
    rows_TE: torch.Tensor | None = None
    """What shall seem to come before the first of a stage's layers."""
    is_stage: bool = False
    """Whether rows go on to another stage's layers behind the last one here, or have come from there, without the last norm."""
    places_1T: torch.Tensor | None = None
    """Of the rows that the layers run."""
    latents_1TC: torch.Tensor | None = None
    """Of the rows, as the layer that runs has computed them (`instance.latent`)."""

    def needed(self) -> LayerAttention:
        """Raises RuntimeError outside a step."""
        if self.attention is None:
            raise RuntimeError("the model ran outside a step")
        return self.attention

    def members(self) -> Team:
        """Raises RuntimeError where the whole model is here."""
        if self.team is None:
            raise RuntimeError("the model is no part of one")
        return self.team
