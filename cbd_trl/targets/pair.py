"""The inputs of an operator: two neighbouring anchors, and a plan of what to make between them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cbd_trl.architectures import Architecture
from cbd_trl.shapes.depths import blocks_for_depth
from cbd_trl.surgery.blocks import check_blocks
from cbd_trl.surgery.statistics import SiteStatistics
from cbd_trl.surgery.weights import Weights


@dataclass(frozen=True)
class Pair:
    """Two neighbouring anchors.

    Args:
        upper, lower: weights, the lower cut from the upper in shared coordinates.
        upper_architecture, lower_architecture: of the weights.
        statistics: the upper anchor's moments; None only where no width differs.
        blocks: for each lower layer the upper layers it stands for.
        kept: the one of them that it was cut from.
        costs: what it costs, in nats per token, that it stands for them; None = unknown.
    """

    upper: Weights
    upper_architecture: Architecture
    lower: Weights
    lower_architecture: Architecture
    statistics: SiteStatistics | None
    blocks: Sequence[Sequence[int]]
    kept: Sequence[int]
    costs: Sequence[float] | None = None

    @property
    def equal_widths(self) -> bool:
        """Whether the anchors differ in depth alone."""
        return self.upper_architecture.sizes == self.lower_architecture.sizes

    def moments(self) -> SiteStatistics:
        """Return the upper anchor's statistics.

        Raises:
            ValueError: the pair has none.
        """
        if self.statistics is None:
            raise ValueError(
                "Changing a width needs the upper anchor's statistics, which this chain does not hold. Build the "
                "chain again."
            )
        return self.statistics

    def fraction(self, target: Architecture) -> float:
        """Compute (N_large - N) / (N_large - N_small) in parameters: 0 at the upper anchor, 1 at the lower one."""
        large, small = self.upper_architecture.num_parameters, self.lower_architecture.num_parameters
        return (large - target.num_parameters) / (large - small)


@dataclass(frozen=True)
class Plan:
    """What an operator is to make.

    Args:
        target: depth and widths.
        alpha: weight of the lower anchor in the mix, 0 to 1; None = the operator's own rule.
        swapped: lower layers replaced by their upper blocks; None = as `blocks_for_depth` chooses.
    """

    target: Architecture
    alpha: float | None = None
    swapped: Collection[int] | None = None


def swapped_blocks(pair: Pair, plan: Plan) -> Collection[int]:
    """Choose the lower layers that are replaced by their upper blocks."""
    if plan.swapped is not None:
        return plan.swapped
    return blocks_for_depth(pair.blocks, plan.target.depth, pair.costs, pair.kept, pair.upper_architecture.fits)


def layer_stack(pair: Pair, plan: Plan) -> list[tuple[int | None, int]]:
    """List for each layer of a target the lower layer mixed into it, None in a swapped block, and the upper one."""
    check_blocks(pair.blocks, pair.lower_architecture.depth, pair.upper_architecture.depth)
    swapped, stack = swapped_blocks(pair, plan), list[tuple[int | None, int]]()
    for i, block in enumerate(pair.blocks):
        stack += [(None, layer) for layer in block] if i in swapped else [(i, pair.kept[i])]
    return stack
