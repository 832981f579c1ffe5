"""The order in which a network is evaluated once every layer is a single step."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.junctions import Junction
from qjax.graph.layers import Network, Site
from qjax.graph.matmuls import Matmul


class Activated(NamedTuple):
    """The step right after a layer's activation."""

    site: Site


SpecialStep = Site | Activated | Junction | Matmul
Step = SpecialStep | Any  # or a core.JaxprEqn, whose fields JAX does not type


def schedule(
    network: Network, junctions: Sequence[Junction] = (), matmuls: Sequence[Matmul] = ()
) -> tuple[Step, ...]:
    """Orders what is left to evaluate once every layer with its chain is a single step.

    What a layer's output is added to comes before the layer, wherever no other layer is missing
    for it: the layer is then fitted for the sum.

    Args:
      network: a traced network.
      junctions: those that have grids of their own; each is a step right after its value.
      matmuls: those that are quantized; each is a step in place of its equation.
    """
    ends = {site.chain[-1]: site for site in network.sites}
    inside = {position for site in network.sites for position in site.chain}
    activated = {site.activated: site for site in network.sites if site.activating}
    joined = {junction.var: junction for junction in junctions}
    products = {matmul.position: matmul for matmul in matmuls}
    steps: list[Step] = [joined[var] for var in network.flat.inputs if var in joined]
    for position, equation in enumerate(network.flat.equations):
        if position in ends:
            site = ends[position]
            steps += [site] if site.activating else [site, Activated(site)]
        elif position not in inside:
            steps.append(products.get(position, equation))
            steps += [Activated(activated[v]) for v in equation.outvars if v in activated]
            steps += [joined[v] for v in equation.outvars if v in joined]
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
    """Moves what leads to a shortcut before the layer, unless a layer is part of it."""
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
        case Junction():
            return [step.var]
        case Matmul():
            return [*step.operands]
        case _:
            return jaxpr.variables(step.invars)


def writes(step: Step) -> list[core.Var]:
    """The variables that a step writes."""
    match step:
        case Site():
            return [step.output]
        case Activated():
            return [step.site.activated]
        case Junction():
            return [step.var]
        case Matmul():
            return [step.output]
        case _:
            return list(step.outvars)


def rest_of_params(network: Network, params: Any) -> dict[str, jax.Array]:
    """The leaves of `params` that are read outside of the layers, by path."""
    live = {var for step in schedule(network) for var in reads(step)}
    live.update(jaxpr.variables(network.flat.outputs))
    leaves = zip(network.paths, network.flat.params, jax.tree.leaves(params), strict=True)
    return {path: leaf for path, var, leaf in leaves if var in live}


def segments(
    steps: Sequence[Step],
) -> Iterator[tuple[tuple[core.JaxprEqn, ...], SpecialStep | None]]:
    """Cuts steps into runs of plain equations, each with the step of another kind after it."""
    run: list[core.JaxprEqn] = []
    for step in steps:
        if isinstance(step, SpecialStep):
            yield tuple(run), step
            run = []
        else:
            run.append(step)
    yield tuple(run), None
