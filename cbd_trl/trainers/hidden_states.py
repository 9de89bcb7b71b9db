"""The hidden-state term: which layers are compared, their outputs, and learned projectors between two widths.

Shapes: B rows, T tokens, d student width, D teacher width, L compared layer pairs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel

from cbd_trl.architectures import decoder_layers
from cbd_trl.losses.hidden import HIDDEN_LOSS, mean_hidden_distance
from cbd_trl.surgery.blocks import blocks_of, check_blocks, spaced_layers
from cbd_trl.teachers.local import causal_lm_of
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.hybrid import BlockHybrid, Hybrid, check_swappable, check_together
from cbd_trl.utils.files import replacing
from cbd_trl.utils.tensor_files import save_tensors

NAME = "distill_projectors"
FILE = "projectors.safetensors"


class Projectors(nn.Module):
    """One linear map from student to teacher width for each compared pair of layers.

    The regressor of FitNets (Romero et al. 2015, arXiv 1412.6550, equation 3) in the linear form of TinyBERT's W_h
    (Jiao et al. 2020, arXiv 1909.10351, equation 8). It starts as an orthogonal map, which keeps the size of a state
    where the teacher is at least as wide; neither paper says how it starts.

    Args:
        pairs: L, the number of compared layer pairs.
        student_width: d.
        teacher_width: D.
        seed: of the start; the global random state is left alone.

    Raises:
        ValueError: if any of the three sizes is below 1.
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int, seed: int = 0) -> None:
        super().__init__()
        for name, size in (("pairs", pairs), ("student_width", student_width), ("teacher_width", teacher_width)):
            if size < 1:
                raise ValueError(
                    f"{name}={size}: projectors map the student's hidden states to the teacher's for each compared "
                    "pair of layers, so all sizes must be at least 1. Set hidden_weight=0 to compare no layer."
                )
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for _ in range(pairs):
            layer: Any = skip_init(nn.Linear, student_width, teacher_width, bias=False, dtype=torch.float32)
            nn.init.orthogonal_(layer.weight, generator=generator)
            self.layers.append(layer)

    @property
    def names(self) -> list[str]:
        """Of all parameters."""
        # By number and not from the state dict, where FSDP may have put a flat parameter in place of the weights.
        return [f"layers.{index}.weight" for index in range(len(self.layers))]

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """Project the states of one student layer.

        Args:
            index: of the layer pair.
            hidden: (..., d), any float dtype.

        Returns:
            (..., D), in the dtype of the projector, or of autocast within it.
        """
        layer: Any = self.layers[index]
        return layer(hidden.to(layer.weight.dtype))


@contextmanager
def attached(student: nn.Module, projectors: Projectors) -> Iterator[None]:
    """Within it the projectors are a submodule of the student, so that whatever trains the student trains them.

    They sit on the innermost causal LM under the name `distill_projectors`, and its `save_pretrained` leaves them out.
    A hook on the state dict would do so too, but FSDP 1 refuses a state dict that lacks one of its parameters, for
    which reason a student wrapped by it can only be saved while they are attached.

    Args:
        student: a causal LM, or a PEFT model around one; without the wrapper that trains it.
        projectors: attached on entry and taken off on exit, whatever happens in between.

    Raises:
        ValueError: if the student already has something of that name.
    """
    model = causal_lm_of(student)
    if hasattr(model, NAME):
        raise ValueError(
            f"{type(model).__name__} already has an attribute '{NAME}': another trainer may be training it, or left "
            f"its projectors there. Let that run finish first, or `del model.{NAME}`."
        )
    ignored = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = {*(ignored or ()), *(f"{NAME}.{name}" for name in projectors.names)}
    model.add_module(NAME, projectors)
    try:
        yield
    finally:
        delattr(model, NAME)
        model._keys_to_ignore_on_save = ignored


def without_projectors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the projectors out of a state dict of the student, wrapped or not.

    Args:
        state_dict: left as it is.

    Returns:
        the other entries, in their order.
    """
    return {key: value for key, value in state_dict.items() if not _is_projector(key)}


def save_projectors(projectors: Projectors, folder: str | Path) -> None:
    """Write projectors to `projectors.safetensors`.

    Args:
        projectors: on any device.
        folder: of the checkpoint; made if need be.
    """
    file = Path(folder) / FILE
    with replacing(file) as temporary:
        save_tensors({key: value.contiguous() for key, value in _tensors(projectors).items()}, temporary)


def load_projectors(projectors: Projectors, folder: str | Path) -> None:
    """Read projectors that `save_projectors` wrote.

    Args:
        projectors: overwritten in place, on their device and in their dtype.
        folder: of the checkpoint.

    Raises:
        ValueError: if the file is missing, or holds projectors of other layers or widths.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {FILE}, but this run learns projectors for its hidden-state term: the checkpoint is of "
            "a run without them. Resume from a checkpoint of a run with the same arguments, or start anew."
        )
    tensors = load_file(file)
    own = _tensors(projectors)
    found, wanted = _shapes(tensors), _shapes(own)
    if found != wanted:
        raise ValueError(
            f"{file} holds projectors {found}, this run needs {wanted} (teacher width, student width): the "
            "checkpoint is of other models. Resume with those it was made with, or start anew."
        )
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


class LayerOutputs:
    """Records what layers return, within `recording` alone.

    Forward hooks see the raw output of a layer; the last entry of a model's `hidden_states` is after the final norm.
    They are removed again: a recompute under gradient checkpointing leaves no trace, nor does the trainer on a model
    that was given to it.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[int, nn.Module]] = []

    def watch(self, index: int, layer: nn.Module) -> None:
        """Record a layer's output under an index.

        Args:
            index: key of the record.
            layer: returns a tensor (B, T, D), or a tuple that starts with one.
        """
        self._watched.append((index, layer))

    @contextmanager
    def recording(self, device: torch.device) -> Iterator[dict[int, Tensor]]:
        """Within it outputs are recorded.

        Args:
            device: that they are brought to, from wherever a `device_map` put the layers.

        Yields:
            index -> output (B, T, D), filled as the layers run.
        """
        store: dict[int, Tensor] = {}

        def hook_for(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                store[index] = (output[0] if isinstance(output, tuple) else output).to(device)

            return hook

        handles = [layer.register_forward_hook(hook_for(index)) for index, layer in self._watched]
        try:
            yield store
        finally:
            for handle in handles:
                handle.remove()


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
        ValueError: if the two models cannot be paired as requested.
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
                    "block_map pairs the layers of the student with those of a teacher, and a teacher_cache or what a "
                    "teacher wrote has none to pair: it would be ignored. Leave it out, or give a teacher."
                )
            return
        if not (args.uses_hidden or args.swap_probability):
            if block_map is not None:
                # Not used now, but wrong all the same.
                resolve_block_map(block_map, len(decoder_layers(student)), len(decoder_layers(teacher)))
            return
        ours, theirs = decoder_layers(student), decoder_layers(teacher)
        widths = student.config.get_text_config().hidden_size, teacher.config.get_text_config().hidden_size
        if args.hidden_projector:
            self.projectors = Projectors(len(ours), *widths, seed=args.seed)
        elif args.uses_hidden:
            _check_widths(*widths, block_map)
        blocks = resolve_block_map(block_map, len(ours), len(theirs))
        if block_costs is not None and len(block_costs) != len(ours):
            raise ValueError(
                f"block_costs has {len(block_costs)} entries and the student {len(ours)} layers: give one for each "
                "layer, or leave it out."
            )
        self.hybrid = hybrid
        if hybrid is None and args.swap_probability:
            check_swappable(student.config.get_text_config(), teacher.config.get_text_config(), blocks)
            check_together(student, teacher)
            self.hybrid = BlockHybrid(student, teacher, blocks, args.swap_probability, args.seed, block_costs)
        if args.uses_hidden:
            self._watch(ours, theirs, blocks)

    def _watch(self, ours: nn.ModuleList, theirs: nn.ModuleList, blocks: list[list[int]]) -> None:
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
        """Compute the mean distance over the recorded layers at N places.

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


def _is_projector(key: str) -> bool:
    # Behind whatever prefixes the wrappers put before the attribute's name.
    return f".{NAME}." in f".{key}"


def _tensors(projectors: Projectors) -> dict[str, Tensor]:
    """The parameters, each once: what is trained beside the student may have tied ones."""
    return {key: parameter.detach() for key, parameter in projectors.named_parameters()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensors[key].shape) for key in sorted(tensors)}
