"""Choosing a width for every layer: the least error that a budget allows, exactly."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.progress import Progress
from qjax.quantize import Quantized, quantize
from qjax.recipe import Recipe
from qjax.study.sensitivity import PARTS, Part, Sensitivity, at_width
from qjax.table import table

AVERAGES = tuple(np.arange(2, 8.25, 0.25).tolist())  # budgets that `meet_target` chooses from
FLOAT_BITS = 32
_FIELDS: Mapping[Part, tuple[str, ...]] = {
    "weights": ("weights",),
    "activations": ("inputs", "outputs"),
}


class BudgetError(ValueError):
    """A budget that even the cheapest choices exceed; `least` is what they cost."""

    def __init__(self, message: str, least: int) -> None:
        """Takes the message and the least possible cost."""
        super().__init__(message)
        self.least = least


class Option(NamedTuple):
    """One way to do one item: what it costs, and its error."""

    cost: int
    error: float


def least_error(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Chooses one of the ways to do each item, so that the sum of the errors is least.

    Dynamic programming over the Pareto front of (cost so far, error so far): exact, whatever the
    costs are.

    Args:
      items: the choices for each item.
      budget: what the choices may cost in all.

    Returns:
      The position of the choice for each item.

    Raises:
      BudgetError: even the cheapest choices exceed the budget.
    """
    cheapest = [min(choice.cost for choice in item) for item in items]
    least = sum(cheapest)
    if least > budget:
        raise BudgetError(f"the least possible cost is {least}; the budget is {budget}.", least)
    costs, errors = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    left = budget - least
    for item, lowest in zip(items, cheapest, strict=True):
        extra = np.array([choice.cost - lowest for choice in item])
        all_costs = (costs[:, None] + extra).reshape(-1)
        all_errors = (errors[:, None] + np.array([c.error for c in item])).reshape(-1)
        order = np.lexsort((all_errors, all_costs))
        order = order[all_costs[order] <= left]
        best_before = np.minimum.accumulate(np.append(np.inf, all_errors[order]))[:-1]
        order = order[all_errors[order] < best_before]
        costs, errors = all_costs[order], all_errors[order]
        steps.append(np.divmod(order, len(item)))
    state, chosen = len(costs) - 1, []
    for parents, choices in reversed(steps):
        chosen.append(int(choices[state]))
        state = parents[state]
    return chosen[::-1]


class Allocation(NamedTuple):
    """Widths for the layers of a network.

    Attributes:
      recipe: a recipe that has them as overrides.
      widths: by layer and part; 32 is float.
      average_bits: by part, over all elements.
      error: by part, the sum of the sensitivities of what was chosen.
    """

    recipe: Recipe
    widths: Mapping[tuple[str, Part], int]
    average_bits: Mapping[Part, float]
    error: Mapping[Part, float]

    def __str__(self) -> str:
        """A table of the widths."""
        layers = dict.fromkeys(layer for layer, _ in self.widths)
        size = max(map(len, layers))
        parts = list(self.average_bits)
        rows = [(layer, *(str(self.widths[layer, part]) for part in parts)) for layer in layers]
        rows += [
            ("mean bits", *(f"{bits:.2f}" for bits in self.average_bits.values())),
            ("error", *(f"{error:.2e}" for error in self.error.values())),
        ]
        align, widths = "<" + ">" * len(parts), [size, *[11] * len(parts)]
        return table(("layer", *parts), rows, align, ruled=False, widths=widths)


def allocate(
    sensitivities: Sequence[Sensitivity],
    recipe: Recipe,
    *,
    average_bits: float | None = None,
    max_kernel_bytes: int | None = None,
) -> Allocation:
    """Chooses a width for every layer, of weights and of activations apart.

    Args:
      sensitivities: from `measure_sensitivities`.
      recipe: what else is to be done; the widths that its overrides give are kept and counted.
      average_bits: what the widths of each part may be on average over its elements.
      max_kernel_bytes: what the codes of all kernels may take, each kernel in whole bytes; the
        activations keep the recipe's width.

    Returns:
      An `Allocation`.

    Raises:
      ValueError: not exactly one budget is given.
      BudgetError: it is too small.
    """
    if (average_bits is None) == (max_kernel_bytes is None):
        raise ValueError("give one of `average_bits` and `max_kernel_bytes`.")
    given = _given_widths(recipe, list(dict.fromkeys(item.layer for item in sensitivities)))
    widths: dict[tuple[str, Part], int] = {}
    averages: dict[Part, float] = {}
    errors: dict[Part, float] = {}
    for part in PARTS:
        found = [item for item in sensitivities if item.part == part]
        if not found or (max_kernel_bytes is not None and part == "activations"):
            continue
        total = sum(item.elements for item in found)
        options = [
            [(given[item.layer, part], _error(item, given[item.layer, part]))]
            if (item.layer, part) in given
            else list(item.errors.items())
            for item in found
        ]
        unit = 1 if max_kernel_bytes is None else 8
        items = [
            [Option(-(-bits * item.elements // unit), error) for bits, error in option]
            for item, option in zip(found, options, strict=True)
        ]
        budget = max_kernel_bytes if average_bits is None else int(average_bits * total)
        assert budget is not None
        try:
            chosen = least_error(items, budget)
        except BudgetError as error:
            if average_bits is None:
                needed = f"`max_kernel_bytes` must be at least {error.least:,}"
            else:
                needed = f"`average_bits` must be at least {error.least / total:.2f}"
            value = max_kernel_bytes if average_bits is None else average_bits
            message = f"{needed} for the {part} of all layers; got {value}."
            raise BudgetError(message, error.least) from error
        picked = [option[k] for option, k in zip(options, chosen, strict=True)]
        widths |= {(i.layer, part): bits for i, (bits, _) in zip(found, picked, strict=True)}
        bits_in_all = sum(i.elements * bits for i, (bits, _) in zip(found, picked, strict=True))
        averages[part] = bits_in_all / total
        errors[part] = sum(error for _, error in picked)
    free = {key: bits for key, bits in widths.items() if key not in given}
    return Allocation(_with_widths(recipe, free), widths, averages, errors)


def _given_widths(recipe: Recipe, names: Sequence[str]) -> dict[tuple[str, Part], int]:
    """The widths that stay whatever is chosen, because overrides give them."""
    two, three = (at_width(recipe, width).by_layer(names) for width in (2, 3))
    given: dict[tuple[str, Part], int] = {}
    for name in names:
        for part, fields in _FIELDS.items():
            specs = [getattr(two[name], field) for field in fields]
            if specs == [getattr(three[name], field) for field in fields]:
                given[name, part] = max((s.bits for s in specs if s), default=FLOAT_BITS)
    return given


def _error(item: Sensitivity, bits: int) -> float:
    """The measured error at a width, or at the next narrower one that was measured."""
    if bits == FLOAT_BITS:
        return 0.0
    return item.errors[
        max((width for width in item.errors if width <= bits), default=min(item.errors))
    ]


def _with_widths(recipe: Recipe, widths: Mapping[tuple[str, Part], int]) -> Recipe:
    overrides: dict[str, dict[str, Any]] = {}
    for (layer, part), bits in widths.items():
        used = [field for field in _FIELDS[part] if getattr(recipe, field) is not None]
        changes = {f"{field.removesuffix('s')}_bits": bits for field in used}
        overrides.setdefault(layer, {}).update(changes)
    return dataclasses.replace(recipe, overrides=[*overrides.items(), *recipe.overrides])


def meet_target(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    images: Any,
    recipe: Recipe,
    sensitivities: Sequence[Sensitivity],
    target_drop: float,
    progress: Progress = lambda item, done, total: None,
) -> tuple[Allocation, Quantized, float]:
    """Finds the least average width whose estimated loss of accuracy is within the target.

    The loss is estimated without labels, taking the float network's probabilities for those of the
    labels: the mean of p(ŷ_float | x) − p(ŷ_quantized | x) over the images. Bisection over budgets
    from 2 to 8 bits, the network quantized again for each.

    Args:
      apply_fn: a classifier, a pure function of (params, x) that returns logits float[N, K].
      params: its params.
      images: calibration inputs float[N, ...].
      recipe: what else is to be done.
      sensitivities: from `measure_sensitivities`.
      target_drop: in percentage points of top-1 accuracy.
      progress: called with (what is being done, how much is done, how much there is).

    Returns:
      The allocation, the quantized network and its estimated loss in percentage points.

    Raises:
      ValueError: no budget meets the target.
      BudgetError: overrides give more than 8 bits on average.
    """
    reference = jax.nn.softmax(jax.jit(apply_fn)(params, images))
    last = len(AVERAGES) - 1
    low, high, found, drop = 0, last, None, 0.0
    total = len(AVERAGES).bit_length()
    done = 0
    while low <= high:
        middle = (low + high) // 2
        progress(f"{AVERAGES[middle]:.2f} bits on average", done, total)
        try:
            allocation = allocate(sensitivities, recipe, average_bits=AVERAGES[middle])
        except BudgetError:  # the widths that overrides give take more
            if middle == last:
                raise
            low = middle + 1
            continue
        q = quantize(apply_fn, params, images, allocation.recipe)
        drop = estimated_drop(reference, q.apply_fn(q.params, images))
        if drop <= target_drop:
            found, high = (allocation, q, drop), middle - 1
        else:
            low = middle + 1
        done += 1
    if found is None:
        raise ValueError(
            f"`target_drop` of {target_drop} points is out of reach: {AVERAGES[-1]:g} bits on "
            f"average lose an estimated {drop:.2f}. Allow more, or leave some parts in float."
        )
    return found


def estimated_drop(probabilities: jax.Array, logits: jax.Array) -> float:
    """The expected loss of top-1 accuracy if labels follow the float network's probabilities.

    Args:
      probabilities: of the float network, float[N, K].
      logits: of the quantized network, float[N, K].

    Returns:
      Percentage points.
    """
    chosen = jnp.take_along_axis(probabilities, jnp.argmax(logits, -1)[:, None], axis=-1)[:, 0]
    return 100 * float(jnp.mean(jnp.max(probabilities, -1) - chosen))
