"""How a kernel is quantized while it is trained: by a step, or to its signs.

Gradients reach the latent kernel in float; what the network computes with is made of it at every
call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.formats.affine import straight_through, usable_scale
from qjax.formats.base import elementwise
from qjax.formats.binary import signs

Params = dict[str, jax.Array]


class KernelTraining(NamedTuple):
    """A way to train a kernel.

    Attributes:
      name: of the way.
      start: of (kernel float32[groups, patch, channels], its codes, their format): the arrays to
        train, `kernel` among them.
      forward: of (arrays, format with the step of the moment, key or None): the kernel that the
        network computes with.
      scale: of (arrays, format): the magnitude of a unit of the codes.
      encode: of (arrays, format): the codes.
      constrain: of arrays: the arrays after an update.
    """

    name: str
    start: Callable[[jax.Array, jax.Array, Any], Params]
    forward: Callable[[Params, Any, Any], jax.Array]
    scale: Callable[[Params, Any], jax.Array]
    encode: Callable[[Params, Any], jax.Array]
    constrain: Callable[[Params], Params]


def _unchanged(params: Params) -> Params:
    return params


# ---- By a step


def _start_from_codes(kernel: jax.Array, codes: jax.Array, format: Any) -> Params:
    """The float kernel wherever it rounds to the code, the code's value elsewhere."""
    formats = elementwise(format, kernel.shape[1])
    return {"kernel": jnp.where(formats.encode(kernel) == codes, kernel, formats.decode(codes))}


def _project(params: Params, format: Any, key: Any) -> jax.Array:
    del key
    kernel = params["kernel"]
    return elementwise(format, kernel.shape[1]).project(kernel)


def _encode(params: Params, format: Any) -> jax.Array:
    kernel = params["kernel"]
    return elementwise(format, kernel.shape[1]).encode(kernel)


def _step(params: Params, format: Any) -> jax.Array:
    del params
    return format.step


STEPPED = KernelTraining("stepped", _start_from_codes, _project, _step, _encode, _unchanged)


# ---- BinaryConnect


def _start_in_unit_interval(kernel: jax.Array, codes: jax.Array, format: Any) -> Params:
    """The kernel with values in [−1, 1], and a factor per output channel: the mean magnitude."""
    del codes
    greatest = jnp.max(jnp.abs(kernel), axis=1, keepdims=True)
    slope = _mean_magnitude(kernel, format)
    return {"kernel": kernel / jnp.where(greatest > 0, greatest, 1.0), "slope": slope}


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """The probability of +1: clip((x + 1) / 2, 0, 1)."""
    return jnp.clip((x + 1) / 2, 0, 1)


def binarize(kernel: jax.Array, key: Any = None) -> jax.Array:
    """±1 by the sign, or at random: +1 with the probability `hard_sigmoid`.

    The gradient passes straight through.

    Args:
      kernel: float[...], in [−1, 1].
      key: of the draw; None for the sign.

    References:
      Courbariaux et al., 2015, arXiv:1511.00363, eq. 1 to 3.
    """
    values = signs(kernel)
    if key is not None:
        is_plus = jax.random.bernoulli(key, hard_sigmoid(kernel))
        values = jnp.where(is_plus, jnp.ones_like(kernel), -jnp.ones_like(kernel))
    return straight_through(values, kernel)


def _connect(is_stochastic: bool, params: Params, format: Any, key: Any) -> jax.Array:
    del format
    return params["slope"] * binarize(params["kernel"], key if is_stochastic else None)


def _slope(params: Params, format: Any) -> jax.Array:
    del format
    return usable_scale(jnp.abs(params["slope"]))


def _connected(params: Params, format: Any) -> jax.Array:
    return (signs(params["kernel"]) * signs(params["slope"])).astype(format.dtype)


def _clip_kernel(params: Params) -> Params:
    return params | {"kernel": jnp.clip(params["kernel"], -1, 1)}


def connected(is_stochastic: bool) -> KernelTraining:
    """Kernels in [−1, 1] that are binarized at every call."""
    name = "stochastic" if is_stochastic else "deterministic"
    forward = partial(_connect, is_stochastic)
    return KernelTraining(name, _start_in_unit_interval, forward, _slope, _connected, _clip_kernel)


# ---- Binary weights with their scale


def binary_weights(kernel: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """α·sign(w) with α the mean of |w| over `axes`: the binary kernel of least squared error.

    The gradient is ∂C/∂w = ∂C/∂ŵ · (1/n + α·[|w| ≤ 1]), with n values to an α.

    Args:
      kernel: w, float[...].
      axes: over which values share an α.

    References:
      Rastegari et al., 2016, arXiv:1603.05279, eq. 6 and section 3.1.
    """
    return _binary(kernel, axes)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _binary(kernel: Any, axes: tuple[int, ...]) -> Any:
    return jnp.mean(jnp.abs(kernel), axes, keepdims=True) * signs(kernel)


def _binary_forward(kernel: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return _binary(kernel, axes), kernel


def _binary_backward(
    axes: tuple[int, ...], kernel: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    scale = jnp.mean(jnp.abs(kernel), axes, keepdims=True)
    count = kernel.size / scale.size
    inside = (jnp.abs(kernel) <= 1).astype(kernel.dtype)
    return (gradient * (1 / count + scale * inside),)


_binary.defvjp(_binary_forward, _binary_backward)


def _start_from_kernel(kernel: jax.Array, codes: jax.Array, format: Any) -> Params:
    del codes, format
    return {"kernel": kernel}


def _scaled(params: Params, format: Any, key: Any) -> jax.Array:
    del key
    return binary_weights(params["kernel"], _shared_axes(format))


def _mean_scale(params: Params, format: Any) -> jax.Array:
    return usable_scale(_mean_magnitude(params["kernel"], format))


def _scaled_codes(params: Params, format: Any) -> jax.Array:
    return format.encode(params["kernel"])


SCALED = KernelTraining(
    "scaled", _start_from_kernel, _scaled, _mean_scale, _scaled_codes, _unchanged
)


def _shared_axes(format: Any) -> tuple[int, ...]:
    """The axes of a kernel over which its values share a scale."""
    return tuple(axis for axis, size in enumerate(format.step.shape) if size == 1)


def _mean_magnitude(kernel: jax.Array, format: Any) -> jax.Array:
    return jnp.mean(jnp.abs(kernel), _shared_axes(format), keepdims=True)
