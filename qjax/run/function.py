"""A quantized network as a pure function of its params and an input."""

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.affine import QParams
from qjax.graph import jaxpr
from qjax.graph.jaxpr import Env
from qjax.graph.junctions import find_junctions
from qjax.graph.layers import Network, find_layers, shapes_of
from qjax.graph.matmuls import find_matmuls
from qjax.graph.schedule import Step, schedule
from qjax.run.fake import FAKE
from qjax.run.interpreter import Rules, evaluate


def _type_of(leaf: Any) -> Any:
    """The type of an input; `jnp.result_type` takes longer, and every call asks."""
    return leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A network with its layers replaced: call it with quantized params and an input.

    Functions of the same network are equal and share their compiled programs.

    Attributes:
      apply_fn: the original function.
      params: the shapes of its params, as `jax.ShapeDtypeStruct`.
      shapes: of every layer's kernel, by name, to notice a function that changed.
      rules: how layers are evaluated.
      input: the shapes of an input that it was quantized at; None if they are not known.
    """

    apply_fn: Callable[[Any, Any], Any]
    params: Any
    shapes: Mapping[str, tuple[int, ...]]
    rules: Rules = FAKE
    input: Any = None
    _networks: dict[Any, Network] = dataclasses.field(default_factory=dict, repr=False, init=False)

    def __call__(self, params: Mapping[str, Any], x: Any) -> Any:
        """Evaluates the quantized network, compiled once per shape of `x`.

        Args:
          params: `Quantized.params`: `layers`, a `QuantizedLayer` by name; `rest`, the leaves of
            the original params that are still read, by path; where they are quantized, `sums`, the
            grids of junctions by name, `matmuls`, a `QuantizedMatmul` by name, and `tables`, a
            `QuantizedTable` by name.
          x: an input like the ones of the original function, of any batch size.

        Returns:
          What the original function returns.

        Raises:
          ValueError: the function has other layers at this input's shape than were quantized.
        """
        return self._run("evaluate", outputs, params, x)

    def codes(self, params: Mapping[str, Any], x: Any) -> dict[str, jax.Array]:
        """Evaluates the network for the codes of every layer's pre-activation output, by name.

        Args:
          params: as in a call.
          x: as in a call.

        Returns:
          Integers from qmin to qmax, of quantized matmuls too; layers whose output is in float, or
          has another grid for every input, are left out. Those of a layer that the steps of a loop
          share follow each other.
        """
        return self._run("codes", _codes, params, x)

    def _run(self, name: str, function: Callable[..., Any], params: Any, x: Any) -> Any:
        network = self.network(x)
        key = name, self.rules.key
        return network.program(key, partial(function, network, self.rules))(params, x)

    def network(self, x: Any) -> Network:
        """The network as it is traced at an input's shape.

        Args:
          x: as in a call.

        Raises:
          ValueError: the function has other layers at this input's shape than were quantized.
        """
        leaves, structure = jax.tree.flatten(x)
        key = (
            structure,
            jax.dtypes.canonicalize_dtype(float),
            *((jnp.shape(leaf), _type_of(leaf)) for leaf in leaves),
        )
        if key in self._networks:
            return self._networks[key]
        network = self._checked_network(x)
        if not network.belongs_to_a_trace:
            self._networks[key] = network
        return network

    def _checked_network(self, x: Any) -> Network:
        network = find_layers(self.apply_fn, self.params, shapes_of(x))
        shapes = {site.layer.name: site.layer.kernel_shape for site in network.sites}
        if shapes != dict(self.shapes):
            raise ValueError(
                "`x` leads `apply_fn` through other layers than were quantized: expected "
                f"{dict(self.shapes)}, got {shapes}; quantize with an input of this shape."
            )
        return network

    def __reduce__(self) -> Any:
        """Pickled without what was traced, which is traced again."""
        try:
            pickle.dumps(self.apply_fn)
        except Exception as error:  # each kind of function has its own
            raise TypeError(
                f"a quantized network is pickled with its `apply_fn`, and {self.apply_fn!r} cannot "
                "be: define it by `def` in a module, or use qjax.save(path, q) and "
                "qjax.load(path, apply_fn)."
            ) from error
        given = (self.apply_fn, self.params, dict(self.shapes), self.rules, self.input)
        return type(self), given

    def __deepcopy__(self, memo: Any) -> "QuantizedFunction":
        return self

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizedFunction) and self._key == other._key

    @property
    def _key(self) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(self.params)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return self.apply_fn, structure, shapes, tuple(self.shapes.items()), self.rules.key


def steps_of(network: Network, params: Mapping[str, Any]) -> tuple[tuple[Step, ...], Any]:
    """What `evaluate` takes of a network: its steps, and what they read of `Quantized.params`."""
    grids, products = (params.get(name, {}) for name in ("sums", "matmuls"))
    junctions = find_junctions(network) if grids else ()
    matmuls = find_matmuls(network) if products else ()
    steps = schedule(
        network,
        [junction for junction in junctions if junction.name in grids],
        [matmul for matmul in matmuls if matmul.name in products],
    )
    return steps, {**params["layers"], **grids, **products}


def bind(network: Network, params: Mapping[str, Any], x: Any) -> Env:
    """What is known before a network is evaluated: its params and its input.

    Args:
      network: traced at the shape of `x`.
      params: `Quantized.params`.
      x: an input.
    """
    flat = network.flat
    by_path = dict(zip(network.paths, flat.params, strict=True))
    env = flat.constants | {by_path[path]: leaf for path, leaf in params["rest"].items()}
    for path, table in params.get("tables", {}).items():
        var = by_path[path]
        env[var] = table.values(jaxpr.shape(var), jaxpr.dtype(var))
    env.update(zip(flat.inputs, jax.tree.leaves(x), strict=True))
    return env


def outputs_of(network: Network, env: Env, rules: Rules) -> Any:
    """What the network returns, in real units."""
    flat = network.flat
    outputs = [rules.real(jaxpr.read(env, atom), atom) for atom in flat.outputs]
    return jax.tree.unflatten(flat.out_tree, outputs)


def evaluated(network: Network, rules: Rules, params: Mapping[str, Any], x: Any) -> Env:
    """All values of a network by variable.

    Args:
      network: traced at the shape of `x`.
      rules: of the evaluation.
      params: `Quantized.params`.
      x: an input.
    """
    env = bind(network, params, x)
    steps, read = steps_of(network, params)
    evaluate(steps, env, read, rules)
    return env


def outputs(network: Network, rules: Rules, params: Mapping[str, Any], x: Any) -> Any:
    """What the network returns; the arguments are those of `evaluated`."""
    return outputs_of(network, evaluated(network, rules, params, x), rules)


def _codes(
    network: Network, rules: Rules, params: Mapping[str, Any], x: Any
) -> dict[str, jax.Array]:
    env = evaluated(network, rules, params, x)
    found = {}
    for site in network.first_sites:
        format = params["layers"][site.layer.name].outputs
        if isinstance(format, QParams):
            steps = network.sites_of(site.layer.name)
            codes = [format.encode(env[step.output]) for step in steps]
            found[site.layer.name] = site.outputs_of_all_steps(codes)
    products = params.get("matmuls", {})
    for matmul in find_matmuls(network) if products else ():
        if matmul.name in products and products[matmul.name].outputs is not None:
            found[matmul.name] = products[matmul.name].outputs.encode(env[matmul.output])
    return found
