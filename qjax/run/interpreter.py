"""The one evaluator of a network: its steps in order, by rules for layers and for primitives.

What a value is depends on the rules: real numbers, codes on a grid, counts, names in a graph that
is being written. Whatever has no rule is bound unchanged on real values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import Env
from qjax.graph.junctions import Junction
from qjax.graph.layers import Site
from qjax.graph.matmuls import Matmul
from qjax.graph.schedule import Activated, Step
from qjax.run.matmul import fake_matmul

PrimitiveRule = Callable[[core.JaxprEqn, list[Any]], list[Any] | None]


def project(junction: Junction, grid: Any, value: Any) -> Any:
    """Rounds a real value to its grid."""
    return grid.project(value)


class Rules(NamedTuple):
    """How to evaluate a network.

    Attributes:
      layer: of (site, the layer's parameters, its input): its pre-activation output.
      activated: of (site, the layer's parameters, its output after the activation): that output, as
        the parameters say.
      primitives: by name of a primitive, a rule of (equation, values of its operands) that returns
        the results; None stands for "bind the equation on real values".
      real: of (value, atom that it belongs to): the value as an array of the atom's type.
      joined: of (junction, its grid, value): the value on that grid.
      multiplied: of (matmul, its grids, both operands): its result.
    """

    layer: Callable[[Site, Any, Any], Any]
    activated: Callable[[Site, Any, Any], Any]
    primitives: Mapping[str, PrimitiveRule]
    real: Callable[[Any, jaxpr.Atom], Any]
    joined: Callable[[Junction, Any, Any], Any] = project
    multiplied: Callable[[Matmul, Any, Any, Any], Any] = fake_matmul

    @property
    def key(self) -> tuple[Any, ...]:
        """A hashable value that no other rules have."""
        by_name = tuple(sorted(self.primitives.items(), key=lambda item: item[0]))
        return self.layer, self.activated, by_name, self.real, self.joined, self.multiplied


def evaluate(
    steps: Sequence[Step],
    env: Env,
    layers: Mapping[str, Any],
    rules: Rules,
    watch: Callable[[Step, Env], None] | None = None,
) -> None:
    """Evaluates steps in order, reading and writing `env`.

    Args:
      steps: from `schedule`.
      env: values by variable.
      layers: the parameters of the layers and the grids of the junctions and matmuls among the
        steps, by name.
      rules: how.
      watch: called with every step after it was evaluated.
    """
    for step in steps:
        match step:
            case Site(layer=described):
                env[step.output] = rules.layer(step, layers[described.name], env[step.input])
            case Activated(site=site):
                value = env[site.activated]
                env[site.activated] = rules.activated(site, layers[site.layer.name], value)
            case Junction():
                env[step.var] = rules.joined(step, layers[step.name], env[step.var])
            case Matmul():
                values = [env[var] for var in step.operands]
                env[step.output] = rules.multiplied(step, layers[step.name], *values)
            case _:
                values = [jaxpr.read(env, atom) for atom in step.invars]
                rule = rules.primitives.get(step.primitive.name)
                results = None if rule is None else rule(step, values)
                if results is None:
                    reals = [
                        rules.real(v, atom) for v, atom in zip(values, step.invars, strict=True)
                    ]
                    results = jaxpr.bind(step, reals)
                env.update(zip(step.outvars, results, strict=True))
        if watch is not None:
            watch(step, env)
