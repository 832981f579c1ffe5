"""What to quantize and how: static, hashable descriptions with no arrays in them."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from qjax.fields import check_fields
from qjax.formats.affine import AFFINE
from qjax.formats.base import NumberFormat
from qjax.formats.scales import FREE, POWER_OF_TWO
from qjax.formats.spec import (
    FORMATS,
    ActivationGranularity,
    ActivationRanges,
    QuantSpec,
    check_bits,
    check_choice,
    in_table,
)
from qjax.objectives.base import Objective
from qjax.objectives.table import OBJECTIVES
from qjax.rounding.base import MOMENTS, Rounding
from qjax.rounding.table import ROUNDINGS
from qjax.targets import TARGETS, Target

OutputPosition = Literal["pre_activation", "post_activation", "both"]
Sums = Literal["float", "quantized"]
Matmuls = Literal["float", "quantized"]
Tables = Literal["float", "quantized"]

WEIGHTS = QuantSpec()
ACTIVATIONS = QuantSpec(symmetric=False, granularity="per_tensor")


@dataclasses.dataclass(frozen=True)
class LayerRecipe:
    """How one layer is quantized.

    Attributes:
      weights: format of the kernel, None to leave it in float.
      inputs: format of the layer's input, None to leave it in float. Scales per channel are folded
        into the kernel; an input keeps one scale where it can be negative, or where it is the codes
        of the output before.
      outputs: format of the layer's output, None to leave it in float. Scales and zero points per
        channel are for outputs that nothing reads but a (residual) sum; the others keep one.
      output_position: where the output is quantized: before the activation, after it, or both.
      range_method: how clipping ranges are chosen: `absmax` (the extremes), `percentile` (99.9 % of
        the values), `mse` (least squared error of the tensor itself), `output_mse` (least squared
        error of the layer's output) or `kl` (least divergence of the distribution of the values).
      rounding: `nearest` (half to even) or `gptq` (each rounding error made up for by the elements
        of the same output channel that are still to be rounded).
      reconstructions: least-squares fits of kernel and bias to the quantized input before rounding,
        each leaving out what the activation hides after the one before.
      sweeps: coordinate sweeps over codes and scales after rounding.
      bias_correction: shift each bias by the mean error that quantization leaves in its channel.

    Raises:
      ValueError: a field is outside its choices.
    """

    weights: QuantSpec | None = WEIGHTS
    inputs: QuantSpec | None = ACTIVATIONS
    outputs: QuantSpec | None = ACTIVATIONS
    output_position: OutputPosition = "pre_activation"
    range_method: str | Objective = "output_mse"
    rounding: str | Rounding = "gptq"
    reconstructions: int = 3
    sweeps: int = 2
    bias_correction: bool = True

    def __post_init__(self) -> None:
        check_fields(self, (*_WIDTHS.values(), *_COUNTS, "bias_correction"))
        check_choice("output_position", self.output_position, get_args(OutputPosition))
        in_table("range_method", self.range_method, OBJECTIVES)
        in_table("rounding", self.rounding, ROUNDINGS)
        for argument in _COUNTS:
            _check_count(argument, getattr(self, argument))
        if self.weights is not None and self.weights.is_dynamic:
            raise ValueError(
                "`weights` must have static ranges, which are known; got dynamic, which is for "
                "activations."
            )
        for argument in ("inputs", "outputs"):
            if (spec := getattr(self, argument)) is not None:
                self._check_activations(argument, spec)

    def _check_activations(self, argument: str, spec: QuantSpec) -> None:
        if spec.family.type is not AFFINE.type:
            raise ValueError(
                f"`{argument}` must have a uniform format; got {spec.family.name}, which is for "
                f"weights. Use format={AFFINE.name!r} for activations."
            )
        if spec.granularity == "per_group":
            raise ValueError(
                f"`{argument}` must have granularity per_tensor or per_channel; got per_group, "
                "which is for weights."
            )
        if spec.granularity == "per_channel" and spec.scales.shares is not None:
            raise ValueError(
                f"`{argument}` with {spec.scales.name} scales must have granularity per_tensor; "
                "got per_channel, which is for weights there."
            )
        if spec.granularity == "per_channel" and not self.objective.per_channel:
            *others, last = (name for name, o in OBJECTIVES.items() if o.per_channel)
            raise ValueError(
                f"`{argument}` per channel needs the range_method {', '.join(others)} or {last}; "
                f"got {self.objective.name}, for which a channel has too few values."
            )

    @property
    def objective(self) -> Objective:
        """How clipping ranges are chosen."""
        return in_table("range_method", self.range_method, OBJECTIVES)

    @property
    def round_with(self) -> Rounding:
        """How kernels are rounded."""
        return in_table("rounding", self.rounding, ROUNDINGS)

    @property
    def stored(self) -> "LayerRecipe":
        """The recipe with its widths left out, see `QuantSpec.stored`: what programs depend on."""
        specs = {field: getattr(self, field) for field in _WIDTHS.values()}
        return dataclasses.replace(self, **{field: s and s.stored for field, s in specs.items()})

    @property
    def limits(self) -> dict[str, Any]:
        """What depends on the widths alone: `QuantSpec.limits` by field, None in float."""
        specs = {field: getattr(self, field) for field in _WIDTHS.values()}
        return {field: spec and spec.limits for field, spec in specs.items()}

    @property
    def scales_not_free(self) -> dict[str, str]:
        """The fields whose scales cannot be any number, and the names of their scales."""
        specs = {field: getattr(self, field) for field in _WIDTHS.values()}
        return {
            field: spec.scales.name
            for field, spec in specs.items()
            if spec is not None and spec.scales is not FREE
        }

    @property
    def has_ranges_per_example(self) -> bool:
        """Whether the range of an input or output is that of each example."""
        specs = filter(None, (self.inputs, self.outputs))
        return any(spec.granularity == "per_example" for spec in specs)

    @property
    def is_closed_form(self) -> bool:
        """Whether nothing is searched or refitted, so that a layer takes a single program."""
        return self.objective.loss is None and not (
            self.round_with.needs or self.reconstructions or self.sweeps
        )

    @property
    def needs_moments(self) -> bool:
        """Whether anything reads the second moments of a layer's input."""
        if self.weights is None:
            return False
        is_measured = self.objective.sees_output and self.objective.loss is not None
        uses = (self.reconstructions, self.sweeps, is_measured, MOMENTS in self.round_with.needs)
        return any(uses)


_COUNTS = ("reconstructions", "sweeps")
_MOST = 10_000  # of any count: what would run for days is a slip


def _check_count(argument: str, value: int, least: int = 0, unit: str = "") -> None:
    if value < least:
        raise ValueError(f"`{argument}` must be at least {least}{unit}; got {value}.")
    if value > _MOST:
        raise ValueError(f"`{argument}` must be at most {_MOST}{unit}; got {value}.")


_WIDTHS = {"weight_bits": "weights", "input_bits": "inputs", "output_bits": "outputs"}
_WIDTHS_OF_WEIGHTS = {"bits", "weight_bits"}
_LAYER_FIELDS = tuple(field.name for field in dataclasses.fields(LayerRecipe))


@dataclasses.dataclass(frozen=True)
class Recipe(LayerRecipe):
    """How a whole network is quantized: every layer's recipe, and what differs where.

    Attributes:
      equalize: rescale the channels between two layers that only a ReLU separates, so that their
        activations have like ranges; float accuracy is not touched.
      logits: the network's output is logits of classes along its last axis; `output_mse` chooses
        their range by the error of the probabilities, and lets go of logits that no probability
        shows.
      sequential: fit each layer on the input that its already quantized predecessors produce,
        toward the output that the float network has there, rather than on the float input alone.
      sums: whether residual sums, concatenations, average pools and what goes into them stay in
        float, or have grids of their own as `quantized`, in the format of `outputs`, one scale to a
        tensor. Integer hardware needs them.
      matmuls: whether products of two activations (attention scores, probabilities times values)
        stay in float, or are `quantized`: each operand in the format of `inputs`, the result in
        that of `outputs`, one scale to a tensor.
      tables: whether params that the input picks from (embeddings, kernels of experts) stay in
        float, or are `quantized`: in the format of `weights`, a scale per row; of kernels of
        experts, per expert and output channel.
      end_search: layers whose ranges are searched again by the divergence of the network's output,
        logits of classes, from the float network's: the first, the last, and then those that matter
        most; see `qjax.fit.ends`. 0 for none.
      grid_size: candidate clipping ranges per pass of a search.
      refinements: passes after the first, each around the best candidate so far.
      overrides: `{"Conv_0": {"bits": 8}, "*fc*": {"weights": None}}`: a glob on layer names and the
        fields that differ there. Keys are the fields of `LayerRecipe`, `weight_bits`, `input_bits`,
        `output_bits` (None: float), `bits` for all three that are not in float, and the format
        `weight_format` of weights that are not. The patterns
        `@first` and `@last` stand for the first and the last layer. Later patterns win.

    Raises:
      ValueError: a field is outside its choices, or an override names an unknown field.
    """

    equalize: bool = False
    logits: bool = False
    sequential: bool = True
    sums: Sums = "float"
    matmuls: Matmuls = "float"
    tables: Tables = "float"
    end_search: int = 0
    grid_size: int = 32
    refinements: int = 1
    overrides: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("equalize", "logits", "sequential", "end_search", "grid_size", "refinements")
        check_fields(self, names)
        _check_count("grid_size", self.grid_size, 2, " candidates")
        for argument in ("end_search", "refinements"):
            _check_count(argument, getattr(self, argument))
        if self.end_search and not self.sequential:
            raise ValueError(
                "`end_search` looks at the output of the quantized network, for which layers are "
                "fitted one after the other; got sequential=False. Leave out one of them."
            )
        check_choice("sums", self.sums, get_args(Sums))
        if self.quantizes_sums and (self.outputs is None or self.outputs.is_dynamic):
            found = "float" if self.outputs is None else "dynamic ranges"
            raise ValueError(
                f"`sums` quantized needs `outputs` with static ranges, whose format sums take; got "
                f"{found}. Give `outputs` a width, or leave the sums in float."
            )
        check_choice("matmuls", self.matmuls, get_args(Matmuls))
        if self.quantizes_matmuls and self.inputs is None:
            raise ValueError(
                "`matmuls` quantized needs `inputs` with static ranges, whose format operands "
                "take; got float. Give `inputs` a width, or leave the matmuls in float."
            )
        for argument in ("inputs", "outputs") if self.quantizes_matmuls else ():
            spec = getattr(self, argument)
            if spec is not None and spec.is_dynamic:
                raise ValueError(
                    f"`matmuls` quantized needs `{argument}` with static ranges; got dynamic "
                    "ranges. Use ranges='static', or leave the matmuls in float."
                )
        check_choice("tables", self.tables, get_args(Tables))
        if self.quantizes_tables and self.weights is None:
            raise ValueError(
                "`tables` quantized needs `weights` in codes, whose format tables take; got float. "
                "Give `weights` a width, or leave the tables in float."
            )
        for pattern, _ in self._overrides():
            if not isinstance(pattern, str):
                raise ValueError(
                    f"`overrides` must map globs on layer names to fields; {pattern!r} is no glob."
                )
        frozen = tuple((pattern, tuple(fields.items())) for pattern, fields in self._overrides())
        object.__setattr__(self, "overrides", frozen)
        for recipe in self._layer_recipes():
            self._check_end_search(recipe)

    def _check_end_search(self, recipe: LayerRecipe) -> None:
        for argument, name in recipe.scales_not_free.items():
            if self.end_search and argument != "weights":
                raise ValueError(
                    f"`end_search` tries scales that are no {name}, as those of `{argument}` are "
                    "to be; leave out one of them."
                )

    @property
    def quantizes_sums(self) -> bool:
        """Whether sums have grids of their own."""
        return self.sums == "quantized"

    @property
    def sum_spec(self) -> QuantSpec:
        """The format of quantized sums."""
        assert self.outputs is not None
        return self.outputs.per_tensor

    @property
    def quantizes_matmuls(self) -> bool:
        """Whether products of two activations have grids of their own."""
        return self.matmuls == "quantized"

    @property
    def quantizes_tables(self) -> bool:
        """Whether params that the input picks from are codes."""
        return self.tables == "quantized"

    def _overrides(self) -> list[tuple[str, dict[str, Any]]]:
        items = self.overrides
        items = items.items() if isinstance(items, Mapping) else items
        return [(pattern, dict(fields)) for pattern, fields in items]

    def _base(self) -> LayerRecipe:
        return LayerRecipe(**{field: getattr(self, field) for field in _LAYER_FIELDS})

    def _layer_recipes(self) -> list[LayerRecipe]:
        """The recipe of layers without an override, and one for each override."""
        base = self._base()
        return [base, *(_override(base, fields) for _, fields in self._overrides())]

    def by_layer(
        self, names: Sequence[str], others: Sequence[str] | None = None
    ) -> dict[str, LayerRecipe]:
        """Returns the recipe of each layer, overrides applied in order.

        Args:
          names: all layer names, in dataflow order.
          others: the names of products of two activations and of tables, whose recipes are wanted
            too. Without them, patterns that match no layer are let pass where the recipe quantizes
            such.

        Raises:
          ValueError: a pattern matches no layer.
        """
        known = {"@first": names[:1], "@last": names[-1:]}
        is_partial = others is None and (self.quantizes_matmuls or self.quantizes_tables)
        names = [*names, *(others or ())]
        recipes = dict.fromkeys(names, self._base())
        known |= {name: [name] for name in names}
        for pattern, fields in self._overrides():
            matched = known.get(pattern) or fnmatch.filter(names, pattern)
            if not matched and is_partial:
                continue
            if not matched:
                raise ValueError(
                    f"`overrides` pattern {pattern!r} matches no layer; the layers are "
                    f"{', '.join(names)}."
                )
            for name in matched:
                recipes[name] = _override(recipes[name], fields)
        return recipes

    def check_target(self, target: Target) -> None:
        """Refuses what a target cannot run on integers.

        Raises:
          ValueError: a format is none of the target's, here or in an override.
        """
        for recipe in self._layer_recipes():
            for argument in _WIDTHS.values():
                target.check(argument, getattr(recipe, argument))

    def naive(self) -> "Recipe":
        """The same formats with ranges from the extremes, nearest rounding and no correction."""
        return dataclasses.replace(
            self,
            range_method="absmax",
            rounding="nearest",
            reconstructions=0,
            sweeps=0,
            bias_correction=False,
            equalize=False,
            logits=False,
            sequential=False,
            end_search=0,
        )

    def without_data(self) -> "Recipe":
        """The same formats and methods, less those that look at the outputs of float layers."""
        kept = [
            (pattern, {key: value for key, value in changes.items() if key not in _WITHOUT_DATA})
            for pattern, changes in self._overrides()
        ]
        return dataclasses.replace(self, **_WITHOUT_DATA, overrides=kept)

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as JSON values; `from_json` is its inverse."""

        def encode(value: Any) -> Any:
            if isinstance(value, QuantSpec):
                return value.to_json()
            return value.name if isinstance(value, Objective | Rounding) else value

        fields = {field.name: encode(getattr(self, field.name)) for field in _recipe_fields()}
        fields["overrides"] = [
            [pattern, {key: encode(value) for key, value in changes.items()}]
            for pattern, changes in self._overrides()
        ]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Recipe":
        """Rebuilds a recipe from `to_json`'s output."""

        def decode(items: Mapping[str, Any]) -> dict[str, Any]:
            return {k: QuantSpec(**v) if isinstance(v, Mapping) else v for k, v in items.items()}

        overrides = [(pattern, decode(changes)) for pattern, changes in fields["overrides"]]
        arguments: dict[str, Any] = decode(fields) | {"overrides": overrides}
        return cls(**arguments)


_WITHOUT_DATA = {"reconstructions": 0, "equalize": False, "logits": False, "sequential": False}
_WITHOUT_DATA |= {"end_search": 0}


def _recipe_fields() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(Recipe)


def _override(base: LayerRecipe, fields: Mapping[str, Any]) -> LayerRecipe:
    changes = {}
    formats = dict.fromkeys(_WIDTHS.values()) | {"weights": fields.get("weight_format")}
    if formats["weights"] is not None and not _WIDTHS_OF_WEIGHTS & fields.keys():
        fields = {"weight_bits": base.weights and base.weights.bits} | dict(fields)
    for key, value in fields.items():
        if key == "bits":
            for target, format in formats.items():
                if getattr(base, target) is not None:
                    changes[target] = getattr(base, target).at(value, format)
        elif key in _WIDTHS:
            target = _WIDTHS[key]
            spec = getattr(base, target) or getattr(LayerRecipe(), target)
            changes[target] = None if value is None else spec.at(value, formats[target])
        elif key != "weight_format":
            check_choice("overrides", key, ("bits", "weight_format", *_WIDTHS, *_LAYER_FIELDS))
            changes[key] = value
    return dataclasses.replace(base, **changes)


def recipe(
    bits: int = 8,
    weight_bits: int | None = None,
    input_bits: int | None = None,
    output_bits: int | None = None,
    first_last_bits: int | None = None,
    activation_granularity: ActivationGranularity = "per_tensor",
    fixed_point: bool = False,
    activation_ranges: ActivationRanges = "static",
    weight_format: str | NumberFormat = AFFINE.name,
    target: str | Target | None = None,
    **recipe_fields: Any,
) -> Recipe:
    """Builds a `Recipe` from bit widths.

    Args:
      bits: width of weights, inputs and outputs where nothing else is said.
      weight_bits: width of the weights.
      input_bits: width of the layer inputs.
      output_bits: width of the layer outputs.
      first_last_bits: width of all three in the first and in the last layer; an override that
        `recipe_fields["overrides"]` may override again.
      activation_granularity: of the layer inputs and outputs.
      fixed_point: make every scale a power of two.
      activation_ranges: of the layer inputs and outputs. `dynamic` leaves the outputs in float
        unless `output_bits` asks for them: their codes are known only when all of an output is.
      weight_format: what the codes of weights stand for, see `QuantSpec.format`.
      target: what is to run the network, a name in `qjax.targets.TARGETS` or a `Target`: inputs and
        outputs get the codes that it takes, and what it cannot run on integers is refused.
      **recipe_fields: further fields of `Recipe`, e.g. `inputs=None`.

    Returns:
      A validated `Recipe`.

    Raises:
      ValueError: a width is outside 1 to 16, a field is outside its choices, or the target cannot
        run what is asked for.

    Examples:
      >>> mixed = recipe(8, weight_bits=4, first_last_bits=8)
      >>> by_layer = mixed.by_layer(["stem", "middle", "head"])
      >>> [by_layer[name].weights.bits for name in by_layer]
      [8, 4, 8]
    """
    widths = {"weight_bits": weight_bits, "input_bits": input_bits, "output_bits": output_bits}
    specs = {}
    runtime = None if target is None else in_table("target", target, TARGETS)
    check_bits("bits", bits)
    in_table("weight_format", weight_format, FORMATS)
    formats = {"weights": weight_format}
    for argument, width in widths.items():
        target = _WIDTHS[argument]
        width = bits if width is None else width
        check_bits(argument, width)
        spec = getattr(LayerRecipe(), target).at(width, formats.get(target))
        scales = POWER_OF_TWO if fixed_point else FREE
        specs[target] = dataclasses.replace(spec, scale=scales.name)
    for target in ("inputs", "outputs"):
        finer = {"granularity": activation_granularity, "ranges": activation_ranges}
        finer |= {} if runtime is None else runtime.activations
        specs[target] = dataclasses.replace(specs[target], **finer)
    if activation_ranges == "dynamic" and output_bits is None:
        specs["outputs"] = None
    overrides = recipe_fields.pop("overrides", ())
    overrides = overrides.items() if isinstance(overrides, Mapping) else overrides
    if first_last_bits is not None:
        check_bits("first_last_bits", first_last_bits)
        ends = {end: {"bits": first_last_bits} for end in ("@first", "@last")}
        overrides = [*ends.items(), *overrides]
    made = Recipe(**specs | recipe_fields, overrides=overrides)
    if runtime is not None:
        made.check_target(runtime)
    return made
