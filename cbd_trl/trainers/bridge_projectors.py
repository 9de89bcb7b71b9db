"""What is learned beside the student across vocabularies, and is in no saved model."""

from torch import nn

from cbd_trl.bridge.objectives.cross_attention import CrossModelAttention
from cbd_trl.trainers.hidden_states import Projectors


class BridgeProjectors(Projectors):
    """The projections of DSKD-CMA, and projectors of layers where there are any.

    Args:
        attention: of the objective.
        layers: of the hidden-state term, shared with it; None where it has none.
    """

    def __init__(self, attention: CrossModelAttention, layers: Projectors | None) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList() if layers is None else layers.layers
        self.attention = attention

    @property
    def names(self) -> list[str]:
        """As in `Projectors`."""
        return [*super().names, *(f"attention.{name}" for name, _ in self.attention.named_parameters())]
