"""Evaluating a network with other rules for its layers."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from qjax.formats.affine import fake_quant, quantize_array
from qjax.graph import jaxpr
from qjax.graph.layers import Network, Site, find_layers, path_names
from qjax.run.layer import QuantizedLayer, apply_layer


class Activated(NamedTuple):
    """The step right after a layer's activation."""

    site: Site


Step = core.JaxprEqn | Site | Activated
ApplyLayer = Callable[[Any, QuantizedLayer, jax.Array], jax.Array]


def schedule(network: Network) -> tuple[Step, ...]:
    """Orders what is left to evaluate once every layer with its chain is a single step.

    What a layer's output is added to comes before the layer, wherever no other layer is missing
    for it: the layer is then fitted for the sum.
    """
    ends = {site.chain[-1]: site for site in network.sites}
    inside = {position for site in network.sites for position in site.chain}
    activated = {site.activated: site for site in network.sites if site.activation}
    steps: list[Step] = []
    for position, equation in enumerate(network.flat.equations):
        if position in ends:
            site = ends[position]
            steps += [site] if site.activation else [site, Activated(site)]
        elif position not in inside:
            steps.append(equation)
            steps += [Activated(activated[v]) for v in equation.outvars if v in activated]
    live = set(jaxpr.variables(network.flat.outputs))
    kept = []
    for step in reversed(steps):
        if isinstance(step, Activated) or live.intersection(writes(step)):
            kept.append(step)
            live.update(reads(step))
    steps = kept[::-1]
    for step in kept:
        if isinstance(step, Site) and step.shortcut is not None:
            steps = _with_shortcut_first(step, step.shortcut.value, steps)
    return tuple(steps)


def _with_shortcut_first(site: Site, shortcut: core.Var, steps: list[Step]) -> list[Step]:
    """Moves the equations behind a shortcut before the layer, unless a layer is among them."""
    position = next(index for index, step in enumerate(steps) if step is site)
    wanted, early, late = {shortcut}, [], []
    for step in reversed(steps[position:]):
        if wanted.isdisjoint(writes(step)):
            late.append(step)
        else:
            early.append(step)
            wanted.update(reads(step))
    if any(isinstance(step, Site | Activated) for step in early):
        return steps
    return [*steps[:position], *early[::-1], *late[::-1]]


def reads(step: Step) -> list[core.Var]:
    """The variables that a step reads."""
    match step:
        case Site():
            return [step.input]
        case Activated():
            return [step.site.activated]
        case _:
            return jaxpr.variables(step.invars)


def writes(step: Step) -> list[core.Var]:
    """The variables that a step writes."""
    match step:
        case Site():
            return [step.output]
        case Activated():
            return [step.site.activated]
        case _:
            return list(step.outvars)


def evaluate(
    steps: Sequence[Step],
    env: jaxpr.Env,
    layers: Mapping[str, QuantizedLayer] | None = None,
    apply: ApplyLayer = apply_layer,
) -> None:
    """Evaluates steps in order, reading and writing `env`.

    Args:
      steps: from `schedule`.
      env: values by variable.
      layers: the parameters of the layers among the steps, by name.
      apply: how a layer is evaluated.
    """
    layers = layers or {}
    for step in steps:
        match step:
            case Site(layer=layer):
                y = apply(layer.operation, layers[layer.name], env[step.input])
                env[step.output] = moved(step, y)
            case Activated(site=site):
                activated = layers[site.layer.name].activated
                if activated is not None:
                    env[site.activated] = fake_quant(env[site.activated], activated)
            case _:
                jaxpr.evaluate_equation(step, env)


def moved(site: Site, y: jax.Array) -> jax.Array:
    """Brings the output of a layer's operation to the shape and type that its readers expect."""
    for equation in site.movement:
        [y] = jaxpr.bind(equation, [y])
    return y.astype(jaxpr.dtype(site.output))


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A network with its layers replaced: call it with quantized params and an input.

    Attributes:
      apply_fn: the original function.
      params: the shapes of its params, as `jax.ShapeDtypeStruct`.
      apply_layer: how a layer is evaluated.
      shapes: of every layer's kernel, by name, to notice a function that changed.
    """

    apply_fn: Callable[[Any, Any], Any]
    params: Any
    apply_layer: ApplyLayer
    shapes: Mapping[str, tuple[int, ...]]

    def __call__(self, params: Mapping[str, Any], x: Any) -> Any:
        """Evaluates the quantized network, compiled once per shape of `x`.

        Args:
          params: `Quantized.params`: `layers`, a `QuantizedLayer` by name, and `rest`, the leaves
            of the original params that are still read, by path.
          x: an input like the ones of the original function, of any batch size.

        Returns:
          What the original function returns.

        Raises:
          ValueError: the function has other layers at this input's shape than were quantized.
        """
        return self._compiled(params, x)

    def codes(self, params: Mapping[str, Any], x: Any) -> dict[str, jax.Array]:
        """Evaluates the network for the codes of every layer's pre-activation output, by name.

        Args:
          params: as in a call.
          x: as in a call.

        Returns:
          Integers from qmin to qmax; layers whose output is in float are left out.
        """
        return self._compiled_codes(params, x)

    @functools.cached_property
    def _compiled(self) -> Callable[[Any, Any], Any]:
        return jax.jit(self._evaluate)

    @functools.cached_property
    def _compiled_codes(self) -> Callable[[Any, Any], Any]:
        return jax.jit(self._codes)

    def _evaluate(self, params: Mapping[str, Any], x: Any) -> Any:
        network, env = self._run(params, x)
        outputs = [jaxpr.read(env, atom) for atom in network.flat.outputs]
        return jax.tree.unflatten(network.flat.out_tree, outputs)

    def _codes(self, params: Mapping[str, Any], x: Any) -> dict[str, jax.Array]:
        network, env = self._run(params, x)
        outputs = {site.layer.name: site.output for site in network.sites}
        return {
            name: quantize_array(env[outputs[name]], layer.outputs)
            for name, layer in params["layers"].items()
            if layer.outputs is not None
        }

    def _run(self, params: Mapping[str, Any], x: Any) -> tuple[Network, jaxpr.Env]:
        network, env = self.bound(params["rest"], x)
        evaluate(schedule(network), env, params["layers"], self.apply_layer)
        return network, env

    def bound(self, rest: Mapping[str, jax.Array], x: Any) -> tuple[Network, jaxpr.Env]:
        """Traces the network at an input's shape: (network, the values known before evaluation).

        Args:
          rest: of `Quantized.params`.
          x: as in a call.

        Raises:
          ValueError: the function has other layers at this input's shape than were quantized.
        """
        network = find_layers(self.apply_fn, self.params, jax.eval_shape(lambda x: x, x))
        shapes = {site.layer.name: site.layer.kernel_shape for site in network.sites}
        if shapes != dict(self.shapes):
            raise ValueError(
                "`x` leads `apply_fn` through other layers than were quantized: expected "
                f"{dict(self.shapes)}, got {shapes}; quantize with an input of this shape."
            )
        flat = network.flat
        by_path = dict(zip(path_names(self.params), flat.params, strict=True))
        env = flat.constants | {by_path[path]: leaf for path, leaf in rest.items()}
        env.update(zip(flat.inputs, jax.tree.leaves(x), strict=True))
        return network, env


def rest_of_params(network: Network, params: Any) -> dict[str, jax.Array]:
    """The leaves of `params` that are read outside of the layers, by path."""
    live = {var for step in schedule(network) for var in reads(step)}
    live.update(jaxpr.variables(network.flat.outputs))
    leaves = zip(path_names(params), network.flat.params, jax.tree.leaves(params), strict=True)
    return {path: leaf for path, var, leaf in leaves if var in live}


def segments(
    steps: Sequence[Step],
) -> Iterator[tuple[tuple[core.JaxprEqn, ...], Site | Activated | None]]:
    """Cuts steps into runs of plain equations, each with the layer step that follows it."""
    run: list[core.JaxprEqn] = []
    for step in steps:
        if isinstance(step, Site | Activated):
            yield tuple(run), step
            run = []
        else:
            run.append(step)
    yield tuple(run), None
