"""How far the values in a quantized network are from those in the float one."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from qjax.fit.layer import decibels, energies
from qjax.graph.junctions import Junction, find_junctions
from qjax.graph.layers import Network
from qjax.graph.matmuls import Matmul, find_matmuls
from qjax.programs import FAST_TO_COMPILE
from qjax.run.fake import FAKE
from qjax.run.function import evaluated


def noise_of(
    network: Network,
    floats: Mapping[str, Any],
    quantized: Mapping[str, Any],
    batches: Iterable[Any],
) -> dict[str, float]:
    """The SQNR in decibels of layers after their activation, junctions and matmuls, by name.

    Args:
      network: traced at the shape of a batch.
      floats: the float network in the form of `Quantized.params`, see `qjax.run.tap.float_layers`.
      quantized: `Quantized.params`.
      batches: inputs.
    """
    run = network.program("energies", partial(_energies, network), FAST_TO_COMPILE)
    found = [jax.tree.map(np.asarray, run(floats, quantized, x)) for x in batches]
    signals, noises = (
        {name: np.stack([of[name][part] for of in found]) for name in found[0]} for part in (0, 1)
    )
    return {name: decibels((signals[name], noises[name])) for name in signals}


def _energies(
    network: Network, floats: Mapping[str, Any], quantized: Mapping[str, Any], x: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Those of values in the float network, and of what the quantized one lacks of them."""
    grids = quantized.get("sums", {})
    junctions = [junction for junction in find_junctions(network) if junction.name in grids]
    products = quantized.get("matmuls", {})
    matmuls = [matmul for matmul in find_matmuls(network) if matmul.name in products]
    given = junctions, matmuls
    wanted, found = (_values(network, *given, params, x) for params in (floats, quantized))
    pairs = {name: energies(wanted[name][None], found[name][None]) for name in wanted}
    return {name: (signal[0], noise[0]) for name, (signal, noise) in pairs.items()}


def _values(
    network: Network,
    junctions: Sequence[Junction],
    matmuls: Sequence[Matmul],
    params: Mapping[str, Any],
    x: Any,
) -> dict[str, jax.Array]:
    """The outputs of layers after their activation, the junctions after theirs, the matmuls."""
    env = evaluated(network, FAKE, params, x)
    found = {}
    for site in network.first_sites:
        values = [env[step.activated] for step in network.sites_of(site.layer.name)]
        found[site.layer.name] = site.outputs_of_all_steps(values)
    found |= {j.name: j.activation.function(env[j.var]) for j in junctions}
    return found | {matmul.name: env[matmul.output] for matmul in matmuls}
