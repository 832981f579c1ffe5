"""Objectives that look at values: their extremes, and mean squared errors.

The objective of `output_mse` is the mean squared error of the layer's output:

* weights: E‖(ŵ_c − w_c)ᵀ x‖² = (ŵ_c − w_c)ᵀ H (ŵ_c − w_c) per output channel c, with H = E[x xᵀ];
* inputs: E‖W·(x̂ − x)‖²;
* outputs: E‖act(ẑ) − act(z)‖², which sees that a ReLU discards the negative half.

Logits of classes have E‖√softmax(ẑ) − √softmax(z)‖² instead, twice the squared Hellinger distance:
half the divergence KL(softmax(z) ‖ softmax(ẑ)) where that is small, but bounded, so that no single
example decides.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.objectives.base import Objective, Sample

PERCENT = 99.9  # of the values, that the range of `percentile` keeps


def tensor_error(sample: Sample, format: Any) -> jax.Array:
    """‖x̂ − x‖², summed or averaged to the shape of the range."""
    error = (format.project(sample.values) - sample.target) / sample.unit
    return sample.total(jnp.square(error))


def output_error(sample: Sample, format: Any) -> jax.Array:
    """The mean squared error of the layer's output."""
    return sample.output_error(format.project(sample.values))


def probability_error(sample: Sample, format: Any) -> jax.Array:
    """E‖√softmax(ẑ) − √softmax(z)‖², the last axis being the classes."""
    wanted, found = (
        jnp.sqrt(jax.nn.softmax(z)) for z in (sample.target, format.project(sample.values))
    )
    return jnp.mean(jnp.sum(jnp.square(found - wanted), axis=-1))


ABSMAX = Objective("absmax", "extremes", True, lambda sample: sample.extremes(), None)
PERCENTILE = Objective(
    "percentile", "percentile", False, lambda sample: sample.central(PERCENT), None
)
MSE = Objective("mse", "error of the tensor", True, lambda sample: sample.extremes(), tensor_error)
PROBABILITIES = Objective(
    "probabilities",
    "error of the classes' probabilities",
    True,
    lambda sample: sample.extremes(),
    probability_error,
    sees_output=True,
    is_rugged=True,
)
OUTPUT_MSE = Objective(
    "output_mse",
    "error of the layer's output",
    True,
    lambda sample: sample.extremes(),
    output_error,
    sees_output=True,
    for_logits=PROBABILITIES,
)
