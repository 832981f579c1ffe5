"""What batch norm knows of a layer's output: its mean and deviation in every channel.

Batch norm in evaluation mode is

    z = γ·(y − μ) / √(σ² + ε) + β,

μ and σ² the mean and the variance that y had in training. So z has the mean β and the deviation
|γ|·σ / √(σ² + ε). It is recognised by what it computes: something that depends on params alone is
subtracted, and the rest multiplied by 1/√(v + ε) or divided by √(v + ε) of something else that
does. What follows in the layer's chain is part of it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.fold import slope_and_offset
from qjax.graph.jaxpr import Atom, FlatJaxpr
from qjax.graph.layers import Network, Site

_ROOTS = {"rsqrt": jnp.multiply, "sqrt": jnp.divide}  # what makes a root of v + ε one of v/(v + ε)


class Statistics(NamedTuple):
    """What is known of a layer's pre-activation output over the training images.

    Attributes:
      mean: float32[groups * channels].
      deviation: of that shape.
    """

    mean: jax.Array
    deviation: jax.Array


def output_statistics(network: Network, leaves: Sequence[jax.Array]) -> dict[str, Statistics]:
    """Reads the statistics of batch norm for every layer that it follows.

    Args:
      network: a traced network.
      leaves: the leaves of its params.

    Returns:
      `Statistics` by name; a layer without batch norm in its chain is left out.

    Examples:
      >>> from qjax.graph.layers import find_layers
      >>> def apply_fn(params, x):
      ...     y = x @ params["w"] - params["mean"]
      ...     return y * jax.lax.rsqrt(params["var"] + 1e-5) * params["scale"] + params["offset"]
      >>> vectors = {"mean": 0.0, "var": 1.0, "scale": 2.0, "offset": 3.0}
      >>> params = {name: jnp.full((1, 1), value) for name, value in vectors.items()}
      >>> params["w"] = jnp.ones((3, 1))
      >>> network = find_layers(apply_fn, params, jnp.ones((8, 3)))
      >>> found = output_statistics(network, jax.tree.leaves(params))["w"]
      >>> print(found.mean, found.deviation.round(3))
      [3.] [2.]
    """
    flat = network.flat
    writers = {var: equation for equation in flat.equations for var in equation.outvars}
    variances = _variances(flat, writers)
    ends = {site.layer.name: _normalization(flat, site, variances) for site in network.first_sites}
    wanted = [site for site in network.first_sites if ends[site.layer.name] is not None]
    operands = tuple(step.operand for site in wanted for step in site.operations)
    env = flat.constants | dict(zip(flat.params, leaves, strict=True))
    for position in sorted(jaxpr.needed(flat._replace(outputs=operands))):
        equation = flat.equations[position]
        jaxpr.evaluate_equation(equation, env)
        [*_, root] = equation.outvars
        if root in variances:
            deviation = jnp.sqrt(jaxpr.read(env, variances[root]))
            env[root] = _ROOTS[equation.primitive.name](env[root], deviation)
    found = {}
    for site in wanted:
        rest = site.operations[ends[site.layer.name] :]
        slope, mean = slope_and_offset(rest, site.layer.operation, env)
        found[site.layer.name] = Statistics(mean, jnp.abs(slope))
    return found


def _variances(flat: FlatJaxpr, writers: Mapping[core.Var, core.JaxprEqn]) -> dict[core.Var, Atom]:
    """V of every √(v + ε) and 1/√(v + ε) that depends on params alone, by variable."""
    found, depends = {}, jaxpr.dependences(flat)
    for equation in flat.equations:
        if equation.primitive.name not in _ROOTS:
            continue
        [operand], [root] = equation.invars, equation.outvars
        sum_of = writers.get(operand) if isinstance(operand, core.Var) else None
        if sum_of is None or sum_of.primitive.name != "add" or not depends[root].params_only:
            continue
        parts = [a for a in sum_of.invars if jaxpr.depends_on([a], depends).params_only]
        if len(parts) == 1:
            found[root] = parts[0]
    return found


def _normalization(flat: FlatJaxpr, site: Site, variances: Mapping[core.Var, Atom]) -> int | None:
    """The position in a layer's chain after batch norm has subtracted the mean, None without it."""
    position = None
    for index, step in enumerate(site.operations):
        if step.primitive == "sub" and not step.is_reversed:
            position = index + 1
        elif step.primitive in ("mul", "div") and position is not None:
            live = jaxpr.needed(flat._replace(outputs=(step.operand,)))
            if any(out in variances for i in live for out in flat.equations[i].outvars):
                return position
    return None
