"""Student layers beside the teacher layers they stand for: the hidden-state term and hybrids."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from cbd_trl.architectures import decoder_layers
from cbd_trl.losses.hidden import HIDDEN_LOSS, mean_hidden_distance
from cbd_trl.surgery.blocks import blocks_of, check_blocks, spaced_layers
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.hidden_states import Projectors
from cbd_trl.trainers.hybrid import BlockHybrid, Hybrid, check_swappable
from cbd_trl.trainers.meters import LayerOutputs


class LayerPairs:
    """Pairs the layers of two models, if the arguments ask for anything that needs it.

    Args:
        student: the model being trained, not wrapped.
        teacher: the frozen teacher, not wrapped; None where it has no layers of its own to compare with.
        block_map: for each student layer the consecutive teacher layers it stands for; None for blocks as even as
            possible.
        block_costs: for each student layer what it costs that it stands for its block (see `BlockHybrid`), or None.
        args: of the run.
        hybrid: what is trained beside the student on hybrid steps; None for the student with blocks of the teacher.

    Raises:
        ValueError: if the two models cannot be paired as asked.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        block_map: list[list[int]] | None,
        block_costs: Sequence[float] | None,
        args: DistillConfig,
        hybrid: Hybrid | None = None,
    ) -> None:
        self.student_outputs, self.teacher_outputs = LayerOutputs(), LayerOutputs()
        self.hybrid: Hybrid | None = None
        self.projectors: Projectors | None = None
        self._loss = args.hidden_loss or HIDDEN_LOSS
        if teacher is None:
            if block_map is not None:
                raise ValueError(
                    "block_map pairs the layers of the student with those of one teacher, and a teacher_cache, what a "
                    "teacher wrote or several teachers have none to pair: it would be ignored. Leave it out, or give "
                    "one teacher."
                )
            return
        if not (args.uses_hidden or args.swap_probability):
            if block_map is not None:
                # Not used now, but wrong all the same.
                resolve_block_map(block_map, len(decoder_layers(student)), len(decoder_layers(teacher)))
            return
        student_config, teacher_config = student.config.get_text_config(), teacher.config.get_text_config()
        widths = student_config.hidden_size, teacher_config.hidden_size
        if args.hidden_projector:
            self.projectors = Projectors(student_config.num_hidden_layers, *widths, seed=args.seed)
        elif args.uses_hidden:
            _check_widths(*widths, block_map)
        ours, theirs = decoder_layers(student), decoder_layers(teacher)
        blocks = resolve_block_map(block_map, len(ours), len(theirs))
        if block_costs is not None and len(block_costs) != len(ours):
            raise ValueError(
                f"block_costs has {len(block_costs)} entries and the student {len(ours)} layers: give one for each "
                "layer, or leave it out."
            )
        if hybrid is not None:
            self.hybrid = hybrid
        elif args.swap_probability:
            check_swappable(student_config, teacher_config, blocks)
            self.hybrid = BlockHybrid(student, teacher, blocks, args.swap_probability, args.seed, block_costs)
        if args.uses_hidden:
            for i, block in enumerate(blocks):
                self.student_outputs.watch(i, ours[i])
                self.teacher_outputs.watch(i, theirs[block[-1]])
            for i, layer in self.hybrid.layers if self.hybrid else ():
                self.student_outputs.watch(i, layer)

    def distance(
        self,
        student_states: Mapping[int, Tensor],
        teacher_states: Mapping[int, Tensor],
        ours: Callable[[Tensor], Tensor],
        theirs: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """Mean distance over the recorded layers at N places.

        Args:
            student_states: layer -> output (B, T, d).
            teacher_states: layer -> output (R, U, D) of the last layer of its block.
            ours: from an output of the student to its states at the places, (N, d).
            theirs: likewise of the teacher, (N, D).

        Returns:
            (N,) float32; None if no layer was recorded.
        """
        if not student_states:
            return None
        return mean_hidden_distance(
            ((self._projected(i, ours(student_states[i])), theirs(teacher_states[i])) for i in sorted(student_states)),
            self._loss,
        )

    def _projected(self, layer: int, student_Nd: Tensor) -> Tensor:
        return student_Nd if self.projectors is None else self.projectors(layer, student_Nd)


def resolve_block_map(block_map: list[list[int]] | None, student_layers: int, teacher_layers: int) -> list[list[int]]:
    """Check a block map, or make the even one.

    Args:
        block_map: for each student layer the consecutive teacher layers it stands for; None for blocks as even as
            possible.
        student_layers: depth of the student.
        teacher_layers: depth of the teacher.

    Returns:
        a block map that covers every teacher layer once, in order.

    Raises:
        ValueError: if it does not, or the student is deeper than the teacher.
    """
    if student_layers > teacher_layers:
        raise ValueError(
            f"The student has {student_layers} layers and the teacher {teacher_layers}: hidden_weight, "
            "swap_probability and block_map pair each student layer with one or more of the teacher's. Use a teacher "
            "that is at least as deep, or set both to 0 and leave block_map out."
        )
    if block_map is None:
        return blocks_of(spaced_layers(teacher_layers, student_layers))
    check_blocks(block_map, student_layers, teacher_layers)
    return [list(block) for block in block_map]


def _check_widths(student: int, teacher: int, block_map: list[list[int]] | None) -> None:
    if student > teacher or (student != teacher and block_map is None):
        raise ValueError(
            f"hidden_weight compares hidden states, but the student has {student} channels and the teacher {teacher}: "
            "only models of one chain share channels, those of the narrower one being a prefix of the teacher's. Pass "
            "the pair's block_map if they are of one chain, learn a map between them with hidden_projector=True, or "
            "set hidden_weight=0."
        )
