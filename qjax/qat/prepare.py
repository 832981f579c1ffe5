"""Making a network trainable: from a float network to one that computes with quantized values."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.fit.layerwise import Grid, kind_of, known_grid
from qjax.formats.affine import AFFINE, QParams
from qjax.formats.binary import BINARY, Signs
from qjax.formats.scales import FREE
from qjax.formats.spec import in_table
from qjax.graph.activation import follow_codes
from qjax.graph.fold import Folded, fold
from qjax.graph.frameworks import check_network
from qjax.graph.layers import Network, Site, find_layers, shapes_of
from qjax.graph.operation import by_channel, scale_input_channels
from qjax.graph.schedule import Activated, schedule
from qjax.progress import Progress
from qjax.qat.function import STEPS, Frame, TrainableFunction
from qjax.qat.kernels import STEPPED, Params
from qjax.qat.methods import METHODS, Method
from qjax.quantize import Quantized, quantize
from qjax.recipe import LayerRecipe, Recipe
from qjax.recipe import recipe as make_recipe
from qjax.run.layer import QuantizedLayer, dequantized_bias
from qjax.run.tap import Tap, float_layers, tapped


class Trainable(NamedTuple):
    """A network to train.

    Attributes:
      apply_fn: a pure, differentiable function of (params, x) and, for a stochastic method, a key.
      params: a pytree of float arrays: `layers`, by name, and `rest`, by path.
    """

    apply_fn: TrainableFunction
    params: dict[str, Any]


def prepare(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    x: Any,
    method: str | Method = "lsq",
    recipe: Recipe | None = None,
    *,
    bits: int | None = None,
    progress: bool | Progress = False,
) -> Trainable:
    """Prepares a pretrained network for quantization-aware training by any training loop.

    The network is quantized first (`qjax.quantize`), and training starts from its ranges and codes:
    where the steps are learned, the first call computes what the quantized network does. Batch norm
    is folded in. After every update `apply_fn.constrain(params)` brings the params back to where
    the method wants them.

    Args:
      apply_fn: a pure inference function of (params, x).
      params: pytree of arrays.
      x: calibration inputs, as for `qjax.quantize`.
      method: a name in `qjax.qat.METHODS`, or a `Method`: `lsq` (steps are learned), `ste` (steps
        stay, gradients pass rounding), `ste_gradients` (gradients of outputs are rounded to 8 bits
        as well), `binary_connect`, `binary_connect_stochastic`, `binary_weights` and `xnor` (for
        kernels of one bit; the other layers are trained as by `lsq`).
      recipe: formats of every layer; by default 8 bits everywhere. `inputs=None, outputs=None`
        trains weights alone.
      bits: short for `recipe=qjax.recipe(bits)`.
      progress: as of `qjax.quantize`.

    Returns:
      A `Trainable`: (apply_fn, params).

    Raises:
      ValueError: the method or the recipe cannot be trained.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
      >>> images = jnp.linspace(0.0, 1.0, 32).reshape(8, 4)
      >>> f, p = prepare(lambda params, x: x @ params["w"], params, images, "lsq", bits=3)
      >>> sorted(p["layers"]["w"])
      ['bias', 'input_step', 'kernel', 'output_step', 'weight_step']
      >>> loss = lambda p: jnp.mean((f(p, images) - 1.0) ** 2)
      >>> p = jax.tree.map(lambda p, g: p - 0.01 * g, p, jax.grad(loss)(p))
      >>> q = qjax.qat.finish(f, f.constrain(p), images)
      >>> q.report[0].weight_bits
      3

    References:
      Esser et al., 2020, arXiv:1902.08153 (LSQ); Bengio et al., 2013, arXiv:1308.3432
      (straight-through estimator); Courbariaux et al., 2015, arXiv:1511.00363 (BinaryConnect);
      Rastegari et al., 2016, arXiv:1603.05279 (binary weights, XNOR-Net).
    """
    chosen = in_table("method", method, METHODS)
    if recipe is not None and bits is not None:
        raise ValueError("`recipe` and `bits` were both given; give one of them.")
    recipe = make_recipe(8 if bits is None else bits) if recipe is None else recipe
    if recipe.quantizes_sums:
        raise ValueError(
            "`recipe` must leave the sums in float, whose ranges are not trained; got "
            f"sums={recipe.sums!r}."
        )
    if recipe.quantizes_matmuls:
        raise ValueError(
            "`recipe` must leave the matmuls in float, whose ranges are not trained; got "
            f"matmuls={recipe.matmuls!r}."
        )
    if recipe.quantizes_tables:
        raise ValueError(
            "`recipe` must leave the tables in float, whose scales are not trained; got "
            f"tables={recipe.tables!r}."
        )
    check_network(apply_fn, params)
    network = find_layers(apply_fn, params, shapes_of(x))
    recipes = recipe.by_layer([site.layer.name for site in network.first_sites])
    has_signs = {name: chosen.binarizes_inputs and _is_binary(own) for name, own in recipes.items()}
    for name, own in recipes.items():
        _check(name, own)
        if has_signs[name]:
            _check_signs(name, own)
    if chosen.needs_binary and not any(_is_binary(own) for own in recipes.values()):
        raise ValueError(
            f"`method` {chosen.name} trains kernels of one bit, and the recipe has none; use "
            "weight_bits=1, or the method lsq."
        )
    q = quantize(apply_fn, params, x, recipe, progress=progress)
    taps = _taps(network, q, params, x, [name for name, found in has_signs.items() if found])
    sources = _sources(network, recipes, q.params["layers"], has_signs)
    folded = dict(zip(recipes, fold(network, jax.tree.leaves(params)), strict=True))
    frames, layers = {}, {}
    for site in network.first_sites:
        name = site.layer.name
        layer = q.params["layers"][name]
        training = chosen.binary if _is_binary(recipes[name]) else STEPPED
        frames[name] = Frame(
            weights=layer.weights,
            inputs=None if name in sources else layer.inputs,
            outputs=layer.outputs,
            activated=layer.activated,
            source=sources.get(name),
            training=training,
        )
        if has_signs[name]:
            frames[name], layers[name] = _start_with_signs(
                site, frames[name], folded[name], layer, taps[name].input
            )
        else:
            layers[name] = _start(site, frames[name], folded[name], layer)
    is_float = {k: jnp.issubdtype(v.dtype, jnp.floating) for k, v in q.params["rest"].items()}
    rest = {path: leaf for path, leaf in q.params["rest"].items() if is_float[path]}
    constants = {path: leaf for path, leaf in q.params["rest"].items() if not is_float[path]}
    function = TrainableFunction(q.apply_fn, recipe, chosen, frames, constants)
    return Trainable(function, {"layers": layers, "rest": rest})


def _check(name: str, recipe: LayerRecipe) -> None:
    """Refuses formats whose steps cannot be trained."""
    if recipe.weights is not None and recipe.weights.family.type not in (AFFINE.type, BINARY.type):
        raise ValueError(
            f"layer {name!r} has weights in the format {recipe.weights.family.name}, which has no "
            f"step to train; use the format {AFFINE.name}."
        )
    for field in ("inputs", "outputs"):
        spec = getattr(recipe, field)
        if spec is not None and spec.granularity != "per_tensor":
            raise ValueError(
                f"layer {name!r} has {field} {spec.granularity}, which cannot be trained; use "
                "activation_granularity='per_tensor'."
            )
        if spec is not None and spec.is_dynamic:
            raise ValueError(
                f"layer {name!r} has {field} of dynamic ranges, which have no step to train; use "
                "static ranges."
            )
    for field, scales in recipe.scales_not_free.items():
        raise ValueError(
            f"layer {name!r} has {field} with scales {scales}, which training would leave; use "
            f"scale={FREE.name!r}."
        )


def _is_binary(recipe: LayerRecipe) -> bool:
    return recipe.weights is not None and recipe.weights.family is BINARY


def _start(site: Site, frame: Frame, folded: Folded, layer: QuantizedLayer) -> Params:
    """The parameters that training starts from."""
    params: Params = {
        "kernel": folded.kernel,
        "bias": dequantized_bias(site.layer.operation, layer),
    }
    for field, step in STEPS.items():
        format = getattr(frame, field)
        if isinstance(format, QParams) and (field != "weights" or frame.training is STEPPED):
            params[step] = format.scale
    if frame.weights is not None:
        params |= frame.training.start(folded.kernel, layer.kernel, frame.weights)
    return params


def _check_signs(name: str, recipe: LayerRecipe) -> None:
    if recipe.inputs is None or recipe.inputs.bits != 1:
        width = "float" if recipe.inputs is None else f"{recipe.inputs.bits} bits"
        raise ValueError(
            f"`method` xnor reads the inputs of layers with kernels of one bit as signs; layer "
            f"{name!r} has inputs of {width}. Use input_bits=1, or the method binary_weights."
        )


def _taps(
    network: Network, q: Quantized, params: Any, x: Any, names: Sequence[str]
) -> dict[str, Tap]:
    """What the layers of these names read and write in the float network."""
    if not names:
        return {}
    run = tapped(q.apply_fn.apply_fn, q.apply_fn.params, x, names)
    return run(float_layers(network, params), x)[1]


def _start_with_signs(
    site: Site, frame: Frame, folded: Folded, layer: QuantizedLayer, x: jax.Array
) -> tuple[Frame, Params]:
    """Frame and parameters of a layer whose input is read as signs.

    The shift is the mean of each input channel; the bias takes up what the kernel makes of it.
    """
    operation = site.layer.operation
    axes = {axis % x.ndim for axis in operation.input_axes}
    shift = x.mean([axis for axis in range(x.ndim) if axis not in axes], keepdims=True)
    width = float(jnp.std(x - shift))
    signed = frame._replace(inputs=Signs(shift), width=width if width > 0 else 1.0)
    params = _start(site, signed, folded, layer)
    channels = by_channel(operation.input_axes, shift).reshape(-1)
    constant = scale_input_channels(operation, folded.kernel, channels).sum(1).reshape(-1)
    return signed, params | {"shift": shift, "bias": folded.bias + constant}


def _sources(
    network: Network,
    recipes: dict[str, LayerRecipe],
    layers: dict[str, QuantizedLayer],
    has_signs: Mapping[str, bool],
) -> dict[str, str]:
    """The layers whose input is already on a grid of the width that it is to have, and whose.

    It is the grid of another layer's output (the same one in all steps of a loop); both are then
    one, and are trained as one.
    """
    grids: dict[core.Var, tuple[str, Grid]] = {}
    found: dict[str, set[str | None]] = collections.defaultdict(set)

    def record(var: core.Var, name: str, qparams: QParams | None) -> None:
        spec = recipes[name].outputs
        if qparams is not None and spec is not None:
            grids[var] = name, Grid(qparams, kind_of(spec))

    for step in schedule(network):
        match step:
            case Site(layer=described):
                inputs = recipes[described.name].inputs
                source, grid = grids.get(step.input, (None, None))
                is_kept = known_grid(inputs, grid) is not None and not has_signs[described.name]
                found[described.name].add(source if is_kept else None)
                record(step.output, described.name, layers[described.name].outputs)
            case Activated(site=site):
                name = site.layer.name
                record(site.activated, name, layers[name].activated)
            case core.JaxprEqn():
                follow_codes(step, grids, lambda pair: pair[1].greatest)
    alone = {name: sources.pop() for name, sources in found.items() if len(sources) == 1}
    return {name: source for name, source in alone.items() if source is not None}
