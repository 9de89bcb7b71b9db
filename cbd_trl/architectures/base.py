"""A family's description, and the description resolved for one config."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from cbd_trl.architectures.axes import Axes, axis_length, parse_axes, tensor_shape

# Dimensions that a cut or growth changes; models of one chain have the others in common.
FREE = ("width", "ffn", "expert", "group", "query", "conv")
# What torch gives a LayerNorm that is made without one.
TORCH_LAYER_NORM_EPS = 1e-5
# An index into a tensor; empty for the whole.
Place = tuple[int | slice, ...]


@dataclass(frozen=True)
class Site:
    """A place where linear layers read a stream.

    Args:
        name: module whose input is the stream: a norm (the stream is then taken after normalizing, before gain and
            bias) or the reading linear layer itself.
        axis: the readers' input axis, for example `"width"`, `"ffn"` or `"group.query.dim"`.
        readers: modules whose weight reads the stream.
        norm: whether `name` is a norm.
        routed: whether `name` is a module of experts, and what is read the neurons of each, by the tokens that a
            router sends there. No second moments are taken: nothing is fitted to what a cut leaves of them.
    """

    name: str
    axis: tuple[str, ...]
    readers: tuple[str, ...]
    norm: bool
    routed: bool = False


@dataclass(frozen=True)
class OutputNorm:
    """An RMSNorm over what a projection puts out, which no linear layer reads.

    Args:
        name: the norm module.
        axis: the coordinates it is taken over, for example `"width"`, or `"dim"` for each head on its own.
        projection: module whose output it normalizes.
    """

    name: str
    axis: tuple[str, ...]
    projection: str


@dataclass(frozen=True)
class Fused:
    """A tensor that a layer stores and that is several to us, or one by another name.

    Args:
        parts: the tensors of `layer_tensors` in it.
        axis: the stored axis along which they lie.
        interleaved: whether they take turns there (gpt-oss); else one follows the other.
    """

    parts: tuple[str, ...]
    axis: int = 0
    interleaved: bool = False

    def places(self, lengths: Sequence[int]) -> list[slice]:
        """Find where the parts lie along the axis.

        Args:
            lengths: of the parts along the axis.
        """
        if self.interleaved:
            return [slice(i, None, len(lengths)) for i in range(len(lengths))]
        ends = list(itertools.accumulate(lengths, initial=0))
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the stored tensor of its parts."""
        if len(parts) == 1:
            return parts[0]
        if self.interleaved:
            return torch.stack(list(parts), self.axis + 1).flatten(self.axis, self.axis + 1)
        return torch.cat(list(parts), self.axis)


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a layer: a router sends each token to a few of them.

    Args:
        module: of all experts, which is called with the stream (N, D), the experts of each token (N, K) and their
            weights (N, K).
        used: config field of K.
        files: whether safetensors files hold each expert's matrices by themselves, as `<module>.<i>.<name>`.
    """

    module: str
    used: str
    files: bool


@dataclass(frozen=True)
class Family:
    """What the tensors of some model types mean. Names inside a layer are relative to `layers.<i>.`.

    Args:
        model_types: `config.model_type` values described.
        layers: path of the decoder stack.
        depth_field: config field of the number of layers.
        tensors: config -> {name: axes} outside the layers.
        layer_tensors: config -> {name: axes} inside one layer.
        sites: config -> sites inside one layer.
        final_site: the site after the last layer, read by the head.
        embedding, head: names of the embedding and head modules.
        sizes: config -> size of every atomic dimension but "layer".
        assign: writes sizes into a config (a copy).
        shape_fields: {config field a user may set to choose a shape: dimension}; "layer" and "heads" (= group x query)
            besides the atomic ones.
        resolve: (sizes, {dimension: value given}) -> all sizes, filling in what the family ties together.
        norm_type: "rms" (gain) or "layer" (centerd, gain and bias).
        eps_field: config field of the norms' epsilon; None where the config has none and it is torch's default.
        check: raises ValueError on options that the surgery does not support.
        output_norms: config -> {projection: RMSNorm over its output} inside one layer (q/k norms, and norms between a
            sub-layer and the residual addition). They share the epsilon of the other norms.
        gain_offset: added to every stored norm weight to give the gain (Gemma: 1).
        embedding_scale: config -> what the model multiplies its input embeddings by.
        per_layer_fields: config lists with one entry a layer.
        index_fields: config fields that name layers by index beside such a list, emptied where layers move.
        engine_patterns: {model type: {per-layer field: its period, from the first layer on}} where engines other than
            transformers (llama.cpp) have these entries built in by position and read no list.
        when: which configs of its model types it describes.
        fused: {stored tensor of a layer: the tensors of `layer_tensors` in it}.
        layer_constants: config -> {name: value} of the numbers that a layer stores beside its parameters.
        bare_norms: whether the norms have no gain, and the final one normalizes the input embeddings too (nanochat).
            Surgery works with gains all the same: of 1, and put into their readers where the weights are stored.
        file_names: {name in a safetensors file: name in the model} where transformers renames what it reads.
        experts: of every layer; None where the FFN is one.
        own_modules: {module of a layer: the one of `layer_types` whose layers have it} where layers differ in that.
        kept_fields: {config field that is like a shape field and is none: the reason, as a clause}.
        fixed_eps: whether growth in width has to leave the norms' epsilon as it is (see `Architecture.fixed_eps`).
    """

    model_types: tuple[str, ...]
    layers: str
    depth_field: str
    tensors: Callable[[Any], dict[str, str]]
    layer_tensors: Callable[[Any], dict[str, str]]
    sites: tuple[Site, ...]
    final_site: Site
    embedding: str
    head: str
    sizes: Callable[[Any], dict[str, int]]
    assign: Callable[[Any, Mapping[str, int]], None]
    shape_fields: Mapping[str, str]
    resolve: Callable[[Mapping[str, int], Mapping[str, int]], dict[str, int]]
    norm_type: str
    eps_field: str | None
    check: Callable[[Any], None]
    output_norms: Callable[[Any], dict[str, str]] = lambda config: {}
    gain_offset: float = 0.0
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    index_fields: tuple[str, ...] = ()
    engine_patterns: Mapping[str, Mapping[str, tuple[Any, ...]]] = dataclasses.field(default_factory=dict)
    when: Callable[[Any], bool] = lambda config: True
    fused: Mapping[str, Fused] = dataclasses.field(default_factory=dict)
    bare_norms: bool = False
    layer_constants: Callable[[Any], dict[str, float]] = lambda config: {}
    file_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    experts: Experts | None = None
    own_modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed_eps: bool = False


class Architecture:
    """A family's description resolved for one config: the axes of every tensor, the sites, the sizes.

    Args:
        family: the family's description.
        config: the model's config; it is never changed.

    Raises:
        ValueError: a size in the config is not a positive whole number.
    """

    def __init__(self, family: Family, config: PretrainedConfig) -> None:
        self.family = family
        self.config = config
        self.depth: int = getattr(config, family.depth_field)
        self.sizes: dict[str, int] = family.sizes(config)
        self.tied: bool = bool(config.tie_word_embeddings)
        if bad := {name: size for name, size in {"layer": self.depth, **self.sizes}.items() if not _is_size(size)}:
            raise ValueError(f"The config gives the model the sizes {bad}: each must be a positive whole number.")

    def __repr__(self) -> str:
        return f"Architecture({self.config.model_type}, {self.shape})"

    @property
    def shape(self) -> dict[str, int]:
        """The shape in the family's own config fields."""
        values = {**self.sizes, "layer": self.depth, "heads": self.sizes["group"] * self.sizes["query"]}
        return {field: values[dim] for field, dim in self.family.shape_fields.items()}

    def resolve_sizes(self, fields: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
        """Resolve the depth and atomic sizes that config fields mean; what they leave out stays as it is here.

        What the family ties together follows: key/value groups take their query heads, GPT-2's width its heads.

        Raises:
            ValueError: a field is not a shape field, not a positive integer, or does not go with the others.
        """
        for field, value in fields.items():
            if field not in self.family.shape_fields:
                reason = self.family.kept_fields.get(field)
                raise ValueError(
                    f"{field!r} is not a shape field of {self.config.model_type}{f': {reason}' if reason else ''}. "
                    f"Shape fields: {', '.join(self.family.shape_fields)}."
                )
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {value!r}.")
        given = {self.family.shape_fields[field]: value for field, value in fields.items()}
        depth = given.pop("layer", self.depth)
        return depth, self.family.resolve(self.sizes, given)

    def kind(self, layer: int) -> str | None:
        """Name the kind of a layer, one of `layer_types`; None where the tensors of all layers are the same."""
        return self.entry("layer_types", layer) if self.family.own_modules else None

    def of_kinds(self, layers: Iterable[int], model: "Architecture") -> list[int]:
        """Find the layers here that are nearest to those given and of the kinds that another model's layers have.

        Args:
            layers: one for each layer of `model`.
            model: of the same family.

        Raises:
            ValueError: there is no layer of a kind.
        """
        found = []
        for position, wanted in enumerate(layers):
            kind = model.kind(position)
            same = [layer for layer in range(self.depth) if self.kind(layer) == kind]
            if not same:
                raise ValueError(
                    f"Layer {position} is to be of the type {kind}, and the {self.depth} layers that it is to be made "
                    "of have none such. Choose an operator that takes it from the other anchor, or another depth."
                )
            found.append(min(same, key=lambda layer: abs(layer - wanted)))
        return found

    def _has(self, layer: int, name: str) -> bool:
        """Whether a layer has a module, or a tensor, of its family."""
        own = self.family.own_modules.items()
        return all(self.kind(layer) == kind for module, kind in own if f"{name}.".startswith(f"{module}."))

    def layer_name(self, layer: int, name: str) -> str:
        """Name a tensor of a layer as a key of the state dict."""
        return f"{self.family.layers}.{layer}.{name}"

    def split_name(self, key: str) -> tuple[int | None, str]:
        """`"model.layers.3.mlp.up_proj.weight"` -> `(3, "mlp.up_proj.weight")`; outside the layers `(None, key)`."""
        start = self.family.layers + "."
        if not key.startswith(start):
            return None, key
        layer, name = key[len(start) :].split(".", 1)
        return int(layer), name

    @cached_property
    def tensors(self) -> dict[str, Axes]:
        """Axes of every parameter, a tied head left out: `{key: axes}`.

        Keys are those of the model's state dict, save that the parts of a fused tensor have keys of their own, and
        that norms without gains have some here.
        """
        family, config = self.family, self.config
        outer = {key: parse_axes(text) for key, text in family.tensors(config).items()}
        outer |= self._gains([family.final_site])
        if self.tied:
            outer.pop(f"{family.head}.weight", None)
        inner = self._gains(family.sites)
        inner |= {key: parse_axes(text) for key, text in family.layer_tensors(config).items()}
        layers = {
            self.layer_name(i, key): axes
            for i in range(self.depth)
            for key, axes in inner.items()
            if self._has(i, key)
        }
        return {**outer, **layers}

    def _gains(self, sites: Iterable[Site]) -> dict[str, Axes]:
        """Axes of the gains that the model does not store."""
        return {f"{site.name}.weight": (site.axis,) for site in sites if site.norm and self.family.bare_norms}

    @cached_property
    def stored(self) -> dict[str, tuple[str, Place]]:
        """Where the model keeps each tensor that it has: `{key: (state dict key, place in that tensor)}`, the parts of
        a tensor in their order."""
        gains = self._gains(self.sites)
        places: dict[str, tuple[str, Place]] = {key: (key, ()) for key in self.tensors if key not in gains}
        for layer in range(self.depth):
            for name, fused in self.family.fused.items():
                keys = [self.layer_name(layer, part) for part in fused.parts]
                found = fused.places([axis_length(self.tensors[key][fused.axis], self.sizes) for key in keys])
                for key, place in zip(keys, found, strict=True):
                    before = (slice(None),) * fused.axis
                    places[key] = (self.layer_name(layer, name), (*before, place) if len(keys) > 1 else ())
        return places

    def fused(self, name: str) -> Fused | None:
        """How a tensor of the state dict is made of several; None where it is stored as it is."""
        return self.family.fused.get(self.split_name(name)[1])

    @cached_property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's state dict, a tied head left out: `{state dict key: shape}`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for key, (name, _) in self.stored.items():
            shape, fused = tensor_shape(self.tensors[key], self.sizes), self.fused(name)
            if fused is not None and name in shapes:
                length = shapes[name][fused.axis] + shape[fused.axis]
                shape = (*shape[: fused.axis], length, *shape[fused.axis + 1 :])
            shapes[name] = shape
        return shapes | dict.fromkeys(self.constants, ())

    @cached_property
    def files(self) -> dict[str, dict[str, Place]]:
        """What safetensors files hold of each tensor of the state dict: `{state dict key: {name in a file: place}}`.

        As transformers writes them: of one that holds experts, every matrix of every expert by itself.
        """
        found: dict[str, dict[str, Place]] = {name: {name: ()} for name in self.state_shapes}
        experts = self.family.experts
        if experts is None or not experts.files:
            return found
        for key, (name, place) in self.stored.items():
            layer, own = self.split_name(key)
            if layer is None or not own.startswith(f"{experts.module}."):
                continue
            prefix, rest = self.layer_name(layer, experts.module), own.removeprefix(f"{experts.module}.")
            if found[name].keys() == {name}:
                found[name] = {}
            found[name] |= {f"{prefix}.{i}.{rest}": (i, *place[1:]) for i in range(self.sizes["expert"])}
        return found

    @cached_property
    def constants(self) -> dict[str, float]:
        """Numbers that the model stores and that are no parameters: `{state dict key: value}`."""
        constants = self.family.layer_constants(self.config)
        return {
            self.layer_name(layer, name): value for layer in range(self.depth) for name, value in constants.items()
        }

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the model, the final one last."""

        def placed(site: Site, layer: int) -> Site:
            readers = tuple(self.layer_name(layer, reader) for reader in site.readers if self._has(layer, reader))
            return dataclasses.replace(site, name=self.layer_name(layer, site.name), readers=readers)

        inside = tuple(
            placed(site, layer)
            for layer in range(self.depth)
            for site in self.family.sites
            if self._has(layer, site.name)
        )
        return (*inside, self.family.final_site)

    @cached_property
    def measured_sites(self) -> tuple[Site, ...]:
        """Those of them whose second moments are taken, and whose readers a cut fits anew."""
        return tuple(site for site in self.sites if not site.routed)

    @cached_property
    def writers(self) -> frozenset[str]:
        """Names of the linear layers that add to the stream."""
        return frozenset(reader for site in self.sites if site.axis != ("width",) for reader in site.readers)

    @cached_property
    def output_norms(self) -> tuple[OutputNorm, ...]:
        """Every norm over what a projection puts out."""
        names = self.family.output_norms(self.config)
        placed = [
            (self.layer_name(layer, norm), self.layer_name(layer, projection))
            for layer in range(self.depth)
            for projection, norm in names.items()
            if self._has(layer, norm)
        ]
        return tuple(OutputNorm(norm, self.tensors[f"{norm}.weight"][0], projection) for norm, projection in placed)

    @property
    def cut_output_norms(self) -> tuple[OutputNorm, ...]:
        """Those of them that a cut reaches into: a norm of each head on its own is never cut."""
        return tuple(norm for norm in self.output_norms if norm.axis != ("dim",))

    @cached_property
    def norms(self) -> frozenset[str]:
        """Names of all norm modules."""
        return frozenset(site.name for site in self.sites if site.norm) | {norm.name for norm in self.output_norms}

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies its input embeddings by."""
        return self.family.embedding_scale(self.config)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, a tied table counted once."""
        return sum(math.prod(tensor_shape(self.tensors[key], self.sizes)) for key in self.stored)

    @property
    def num_active_parameters(self) -> int:
        """Number of those that a token is computed with: of a mixture of experts, the experts that it is sent to."""
        return self.active(self.stored)

    def active(self, keys: Iterable[str]) -> int:
        """Count the parameters among these tensors that a token is computed with."""
        experts, total = self.family.experts, 0
        for key in keys:
            count, (layer, name) = math.prod(tensor_shape(self.tensors[key], self.sizes)), self.split_name(key)
            if experts is not None and layer is not None and name.startswith(f"{experts.module}."):
                count = count * int(getattr(self.config, experts.used)) // self.sizes["expert"]
            total += count
        return total

    def resized(self, **sizes: int) -> "Architecture":
        """The same architecture with other widths (atomic sizes) and norm epsilon untouched; depth stays."""
        config = copy.deepcopy(self.config)
        self.family.assign(config, {**self.sizes, **sizes})
        return Architecture(self.family, config)

    def with_layers(self, layers: Iterable[int]) -> "Architecture":
        """The same architecture with these layers, in this order; per-layer lists of the config travel with them."""
        layers = list(layers)
        config = copy.deepcopy(self.config)
        setattr(config, self.family.depth_field, len(layers))
        for name in self.family.per_layer_fields:
            entries = getattr(config, name, None)
            if entries is not None:
                setattr(config, name, [entries[layer] for layer in layers])
        for name in self.family.index_fields:
            setattr(config, name, None)
        return Architecture(self.family, config)

    @cached_property
    def engine_pattern(self) -> Mapping[str, tuple[Any, ...]]:
        """What engines have built in of the per-layer entries: `{field: period}`, empty where they read them all."""
        return self.family.engine_patterns.get(self.config.model_type, {})

    def _differing(self, layer: int, position: int) -> list[str]:
        """Fields in which a layer is not what engines take the layer at a position for."""
        pattern = self.engine_pattern.items()
        return [field for field, period in pattern if self.entry(field, layer) != period[position % len(period)]]

    def entry(self, field: str, layer: int) -> Any:
        """Look up a layer's entry in a per-layer list of the config; None where there is no such list."""
        entries = getattr(self.config, field, None)
        return None if entries is None else entries[layer]

    @cached_property
    def off_pattern(self) -> list[int]:
        """Layers that engines with a built-in pattern take for others than they are."""
        return [layer for layer in range(self.depth) if self._differing(layer, layer)]

    def fits(self, layer: int, position: int) -> bool:
        """Whether a layer of this model keeps the engines' pattern at a position of a model made from it.

        Args:
            layer: index here.
            position: index there.

        Returns:
            True, too, where this model is off the pattern itself: there is nothing to keep.
        """
        return bool(self.off_pattern) or not self._differing(layer, position)

    def starts_period(self, layer: int, position: int) -> bool:
        """Whether whole periods of the engines' pattern stand for whole periods.

        Args:
            layer: the first layer here of what stands for the rest of a shallower model.
            position: the first layer there of that rest.

        Returns:
            False where a period of the pattern begins there and not here.
        """
        periods = [] if self.off_pattern else [len(period) for period in self.engine_pattern.values()]
        return all(position % period or not layer % period for period in periods)

    def on_pattern(self) -> "Architecture":
        """The same architecture with the per-layer entries that engines assume at every position."""
        config = copy.deepcopy(self.config)
        for field, period in self.engine_pattern.items():
            setattr(config, field, [period[layer % len(period)] for layer in range(self.depth)])
        return Architecture(self.family, config)

    def engine_limit(self, *, chosen: bool = True) -> str | None:
        """What runs differently outside of transformers, in a sentence; None where nothing does.

        Args:
            chosen: False where it is still to be measured which layers of the upper anchor stay: none are named then.
        """
        if not self.off_pattern:
            return None
        built_in = " and ".join(
            f"{field} (every {len(period)} layers)" for field, period in self.engine_pattern.items()
        )
        layers = f"layer{'s' * (len(self.off_pattern) > 1)} {', '.join(map(str, self.off_pattern))}"
        return (
            f"llama.cpp does not read {built_in} of {self.config.model_type} but counts them, and "
            f"takes {layers if chosen else 'some layers'} of this model for what they are not, so a GGUF file of it "
            "computes something else than transformers does."
        )

    @property
    def fixed_eps(self) -> bool:
        """Whether growth in width has to leave the epsilon of the norms as it is: there is no field for it, a norm of
        the embeddings makes what the others then normalize, or a norm has it behind an activation, where nothing that
        it normalizes can be scaled."""
        return self.family.fixed_eps or self.family.eps_field is None or self.family.bare_norms

    def with_eps(self, eps: float) -> "Architecture":
        """The same architecture with another norm epsilon.

        Raises:
            ValueError: the family's config has no field for it.
        """
        if self.family.eps_field is None:
            raise ValueError(f"{self.config.model_type} always has a norm epsilon of {self.eps}; got {eps}.")
        config = copy.deepcopy(self.config)
        setattr(config, self.family.eps_field, eps)
        return Architecture(self.family, config)

    @property
    def eps(self) -> float:
        """The epsilon of the norms."""
        field = self.family.eps_field
        return TORCH_LAYER_NORM_EPS if field is None else float(getattr(self.config, field))


def _is_size(size: Any) -> bool:
    return type(size) is int and size > 0


Sizes = Mapping[str, int]


@dataclass(frozen=True)
class WidthOfHeads:
    """The arithmetic of such a family, and its errors in the family's own words.

    Args:
        family: its name for a reader.
        width, heads: its config fields.
    """

    family: str
    width: str
    heads: str

    def head_size(self, width: int, heads: int) -> int:
        """Width / heads.

        Raises:
            ValueError: the division leaves a rest.
        """
        if width % heads:
            raise ValueError(
                f"{self.width}={width} is not a multiple of {self.heads}={heads}: {self.family} splits its width "
                "evenly into heads. Choose a multiple."
            )
        return width // heads

    def check(self, sizes: Sizes) -> None:
        """Check that the heads fill the width (ValueError)."""
        heads, dim = sizes["group"] * sizes["query"], sizes["dim"]
        if sizes["width"] != heads * dim:
            raise ValueError(
                f"{self.family} ties its width to its heads: {self.width}={sizes['width']} needs {self.width} / {dim} "
                f"heads of size {dim}, got {self.heads}={heads}. Choose {self.width} = {dim} x {self.heads}."
            )

    def with_heads(self, sizes: Sizes, given: Sizes) -> dict[str, int]:
        """Add the number of heads that a width means to the sizes given."""
        if "width" not in given or "heads" in given or "group" in given:
            return dict(given)
        return {**given, "heads": max(given["width"] // sizes["dim"], 1)}

    def with_width(self, sizes: Sizes, given: Sizes) -> dict[str, int]:
        """Sizes with resolved heads, and the width that they fill.

        Raises:
            ValueError: the width given is another.
        """
        heads, dim = sizes["group"] * sizes["query"], sizes["dim"]
        width = given.get("width", heads * dim)
        if width != heads * dim:
            raise ValueError(
                f"{self.family} ties its width to its heads (head size {dim}): got {self.width}={width} with "
                f"{self.heads}={heads}. Choose {self.width} = {dim} x {self.heads}."
            )
        return {**sizes, "width": width}

    def resolve(self, sizes: Sizes, given: Sizes) -> dict[str, int]:
        """`Family.resolve` of a family whose every head has its own key and value."""
        given = self.with_heads(sizes, given)
        resolved = {**sizes, "group": given.get("heads", sizes["group"]), "ffn": given.get("ffn", sizes["ffn"])}
        return self.with_width(resolved, given)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers of a causal LM of any family (PEFT wrappers are looked through).

    Raises:
        ValueError: no module list of `config.num_hidden_layers` modules is found.
    """
    # A PEFT wrapper's and a model's own attributes, which nn.Module does not declare.
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    depth = base.config.get_text_config().num_hidden_layers
    # Not those of a tower for images, which may be as many.
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"No stack of {depth} decoder layers was found in {type(base).__name__}, which the hidden-state term and "
        "block swapping need. Set `hidden_weight=0` and `swap_probability=0` to distill from the outputs alone."
    )


# What such embeddings are called in transformers' models (GPT-2 and its kin, OPT and its kin).
_NAMES = {"wpe", "embed_positions", "position_embedding", "position_embeddings", "positions_embed"}


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens a row may have at most.

    Args:
        model: a causal LM, however it is wrapped.

    Returns:
        None for positions that are computed (rotary, ALiBi): there rows may be of any length.
    """
    inside: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    # A tower for images has positions of its own.
    decoder = inside.get_decoder() if hasattr(inside, "get_decoder") else inside
    tables = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and _NAMES & set(name.split("."))
    ]
    return min(tables, default=None)


def learned_positions_of(config: Any) -> int | None:
    """`learned_positions` of a model that is not there yet.

    Args:
        config: of the model.
    """
    with torch.device("meta"):
        return learned_positions(AutoModelForCausalLM.from_config(config))


def check_positions(longest: int, positions: int | None, row: str, model: str, way_out: str) -> None:
    """Check that a row is no longer than a model has positions.

    Args:
        longest: tokens of the row.
        positions: from `learned_positions`.
        row: names the row.
        model: names the model.
        way_out: what to do, as a sentence.

    Raises:
        ValueError: it is.
    """
    if positions is not None and longest > positions:
        raise ValueError(
            f"{row} has {longest} tokens, and {model} has learned {positions} positions: what stands behind them "
            f"cannot be read. {way_out}"
        )
