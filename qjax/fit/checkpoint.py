"""Finished layers on a disk, so that a run that was killed goes on where it was.

One file holds the layers that are fitted, and the values that flow through both networks after the
last one of them; it is replaced whole. What it belongs to stands in it: it is read by a run of the
same network, params, images, recipe and versions, and refused by any other.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from qjax.fit.junction import FittedJunction
from qjax.fit.layer import Fit
from qjax.graph.layers import Network
from qjax.kept_arrays import KeptArrays
from qjax.run.stored import (
    arrays_of_format,
    arrays_of_layer,
    by_path,
    describe_arrays,
    describe_format,
    describe_layer,
    format_template,
    from_paths,
    layer_template,
    restored_array,
    restored_format,
    restored_layer,
    storable,
)

FILE = "layers.safetensors"

Values = dict[core.Var, Any]


class Checkpoint:
    """The file of a run, which may have been interrupted."""

    def __init__(
        self, folder: str | os.PathLike[str], about: Mapping[str, Any], is_writer: bool = True
    ) -> None:
        """Reads what is there; see `KeptArrays`.

        Args:
          folder: of the file.
          about: what the run depends on.
          is_writer: whether this process writes it; one of several does.
        """
        self._is_writer = is_writer
        self._kept = KeptArrays(folder, FILE, about)
        self._entries = self._kept.entries
        try:
            self._arrays = {
                name: restored_array(self._kept.arrays[name], jnp.dtype(dtype), shape)
                for name, (dtype, shape) in self._entries.get("arrays", {}).items()
            }
        except (LookupError, TypeError, ValueError) as error:
            raise self._kept.damaged(f" ({error})") from error

    @property
    def done(self) -> int:
        """How many units of work are finished."""
        return self._entries["done"] if self._entries else 0

    def restore(self, fits: dict[str, Fit], sums: dict[str, FittedJunction]) -> int:
        """Writes what is finished, and returns how many units of work that is."""
        if not self._entries:
            return 0
        fitted = self._entries["fits"]
        template = {
            "fits": {
                name: {"layer": layer_template(item["layer"]), **item["numbers"]}
                for name, item in fitted.items()
            },
            "sums": {
                name: {"grid": format_template(item["grid"]), **item["numbers"]}
                for name, item in self._entries["sums"].items()
            },
        }
        tree = from_paths(template, self._arrays)
        for name, item in fitted.items():
            layer, *numbers = (tree["fits"][name][field] for field in Fit._fields)
            fits[name] = _fit(restored_layer(layer, item["layer"]), *numbers)
        for name, item in self._entries["sums"].items():
            found = tree["sums"][name]
            grid = restored_format(found["grid"], item["grid"])
            energies, shape = tuple(found["energies"]), tuple(item["shape"])
            sums[name] = FittedJunction(grid, energies, found["clip"], shape)
        return self._entries["done"]

    def values(
        self, network: Network, batches: Sequence[jax.Array]
    ) -> tuple[Values, Values] | None:
        """The live values of both streams, where the work goes on; None if they were not kept."""
        if self._entries["live"] is None:
            return None
        variables = _variables(network)
        sharding = batches[0].sharding

        def value(stream: str, number: int) -> Any:
            if number < len(batches):
                return batches[number]
            array = self._arrays[f"{stream}/{number}"]
            is_spread = isinstance(sharding, jax.sharding.NamedSharding)
            return jax.device_put(array, sharding) if is_spread else jnp.asarray(array)

        live = self._entries["live"]
        floats = {number: value("floats", number) for number in live["floats"]}
        quantized = {
            number: floats[number] if number in live["shared"] else value("quantized", number)
            for number in live["quantized"]
        }
        of = [{variables[n]: value for n, value in each.items()} for each in (floats, quantized)]
        return of[0], of[1]

    def write(
        self,
        done: int,
        fits: Mapping[str, Fit],
        sums: Mapping[str, FittedJunction],
        network: Network,
        live: tuple[Values, Values] | None,
        is_last: bool,
    ) -> None:
        """Writes what is finished, unless writing would take more than a share of the time.

        Args:
          done: units of work that are finished.
          fits: the layers.
          sums: the junctions.
          network: the network.
          live: the values of both streams; None to compute them again.
          is_last: whether nothing is left to do.
        """
        if not self._is_writer or not (self._kept.is_due or is_last):
            return
        numbers = {var: number for number, var in enumerate(_variables(network))}
        floats, quantized = (
            {numbers[v]: x for v, x in values.items()} for values in live or ({}, {})
        )
        shared = [n for n, x in quantized.items() if x is floats.get(n)]
        inputs = len(network.flat.inputs)
        arrays = by_path(
            {
                "fits": {name: _arrays_of(fit) for name, fit in fits.items()},
                "sums": {
                    name: {
                        "grid": arrays_of_format(fit.grid),
                        "energies": list(fit.energies),
                        "clip": fit.clip,
                    }
                    for name, fit in sums.items()
                },
                "floats": {str(n): x for n, x in floats.items() if n >= inputs},
                "quantized": {
                    str(n): x for n, x in quantized.items() if n >= inputs and n not in shared
                },
            }
        )
        entries = {
            "done": done,
            "fits": {
                name: {"layer": describe_layer(fit.layer), "numbers": _places(_numbers(fit))}
                for name, fit in fits.items()
            },
            "sums": {
                name: {
                    "grid": describe_format(fit.grid),
                    "shape": list(fit.shape),
                    "numbers": {"energies": [0, 0], "clip": 0},
                }
                for name, fit in sums.items()
            },
            "live": live
            and {"floats": list(floats), "quantized": list(quantized), "shared": shared},
            "arrays": describe_arrays(arrays),
        }
        self._kept.write(entries, {name: storable(array) for name, array in arrays.items()})


def _fit(layer: Any, *numbers: Any) -> Fit:
    fit = Fit(layer, *numbers)
    return fit if fit.energies is None else fit._replace(energies=tuple(fit.energies))


def _numbers(fit: Fit) -> dict[str, Any]:
    """All of a fit but the layer."""
    found = {**fit._asdict(), "energies": fit.energies and list(fit.energies)}
    del found["layer"]
    return found


def _arrays_of(fit: Fit) -> dict[str, Any]:
    return {"layer": arrays_of_layer(fit.layer), **_numbers(fit)}


def _places(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: 0, tree)


def _variables(network: Network) -> list[core.Var]:
    """The variables that values flow through, in an order that is the same in every process."""
    flat = network.flat
    return [*flat.inputs, *(var for equation in flat.equations for var in equation.outvars)]
