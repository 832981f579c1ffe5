"""Reading what flows through every layer of a network, in float or quantized."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from qjax.graph.fold import Folded, fold
from qjax.graph.layers import Network, find_layers, shapes_of
from qjax.graph.matmuls import find_matmuls
from qjax.graph.schedule import rest_of_params
from qjax.programs import FAST_TO_COMPILE
from qjax.run.fake import FAKE
from qjax.run.function import bind, outputs_of, steps_of
from qjax.run.interpreter import Rules, evaluate
from qjax.run.layer import QuantizedLayer


class Tap(NamedTuple):
    """What one layer read and wrote.

    Attributes:
      input: its input, before it is quantized.
      output: its pre-activation output, quantized where the layer says so.
      activated: its output after the activation, quantized where the layer says so.
    """

    input: jax.Array
    output: jax.Array
    activated: jax.Array


class MatmulTap(NamedTuple):
    """What one product of two activations read and wrote.

    Attributes:
      lhs: its first operand, before it is quantized.
      rhs: its second operand, before it is quantized.
      output: its result, quantized where it has a grid.
    """

    lhs: jax.Array
    rhs: jax.Array
    output: jax.Array


Tapped = Callable[[Mapping[str, Any], Any], tuple[Any, dict[str, Any]]]


def float_layers(
    network: Network, params: Any, folded: Sequence[Folded] | None = None
) -> dict[str, Any]:
    """Brings float params to the form of `Quantized.params`, every tensor left in float.

    Args:
      network: a traced network.
      params: its params.
      folded: kernel and bias of each layer, where they are not those of `params`.

    Returns:
      `layers`, the folded layers by name, and `rest`, the other leaves by path.
    """
    folded = fold(network, jax.tree.leaves(params)) if folded is None else folded
    layers = {
        site.layer.name: QuantizedLayer(kernel, bias, None, None, None, None)
        for site, (kernel, bias) in zip(network.first_sites, folded, strict=True)
    }
    return {"layers": layers, "rest": rest_of_params(network, params)}


def tapped(
    apply_fn: Any, params: Any, x: Any, names: Sequence[str] | None = None, rules: Rules = FAKE
) -> Tapped:
    """Makes a function that evaluates a network and keeps what its layers read and write.

    Args:
      apply_fn: the original pure function of (params, x).
      params: the shapes of its params.
      x: an input, or its shape.
      names: the layers and the products of two activations to keep; by default all layers.
      rules: how layers are evaluated.

    Returns:
      A compiled function of (params in the form of `Quantized.params` or `float_layers`, x of that
      shape) that returns what `apply_fn` returns, and by name a `Tap` per layer and a `MatmulTap`
      per product.
    """
    network = find_layers(apply_fn, params, shapes_of(x))
    kept = None if names is None else tuple(names)
    key = f"tap of {kept}", rules.key
    return network.program(key, partial(_run, network, kept, rules), FAST_TO_COMPILE)


def _run(
    network: Network,
    names: Sequence[str] | None,
    rules: Rules,
    params: Mapping[str, Any],
    x: Any,
) -> tuple[Any, dict[str, Any]]:
    env = bind(network, params, x)
    steps, read = steps_of(network, params)
    evaluate(steps, env, read, rules)
    taps: dict[str, Any] = {}
    for site in network.first_sites:
        name = site.layer.name
        if names is None or name in names:
            steps = network.sites_of(name)
            taps[name] = Tap(
                site.inputs_of_all_steps([env[step.input] for step in steps]),
                site.outputs_of_all_steps([env[step.output] for step in steps]),
                site.outputs_of_all_steps([env[step.activated] for step in steps]),
            )
    if names is not None:
        for matmul in find_matmuls(network):
            if matmul.name in names:
                values = [env[var] for var in (*matmul.operands, matmul.output)]
                taps[matmul.name] = MatmulTap(*values)
    return outputs_of(network, env, rules), taps
