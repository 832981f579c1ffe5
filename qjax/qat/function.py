"""A network that is trained while it computes with quantized values: a pure function."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.affine import straight_through
from qjax.formats.binary import Signs, signs
from qjax.graph.layers import Network, Site
from qjax.graph.operation import Linear, along_channels
from qjax.graph.schedule import schedule
from qjax.qat.kernels import KernelTraining, Params
from qjax.qat.methods import Method
from qjax.qat.steps import learned_step, quantize_gradient
from qjax.recipe import Recipe
from qjax.run.fake import real_value
from qjax.run.function import QuantizedFunction, bind, outputs_of
from qjax.run.interpreter import Rules, evaluate
from qjax.run.signs import center, magnitudes

STEPS = {
    "weights": "weight_step",
    "inputs": "input_step",
    "outputs": "output_step",
    "activated": "activated_step",
}  # the parameter by field of a layer


class Frame(NamedTuple):
    """What stays as it is while a layer is trained.

    Attributes:
      weights: format of its kernel, None in float; its step is a parameter, as are the next ones.
      inputs: of its input, None in float or if `source` says it; or `Signs`.
      outputs: of its output before the activation.
      activated: of its output after the activation.
      source: the layer whose codes its input is already, None for none.
      training: of its kernel.
      width: of an input of signs: the deviation up to which gradients pass the sign.
    """

    weights: Any
    inputs: Any
    outputs: Any
    activated: Any
    source: str | None
    training: KernelTraining
    width: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class TrainableFunction:
    """A network with its layers quantized as they are evaluated: call it with params and an input.

    Attributes:
      function: the quantized network that training starts from.
      recipe: of quantization.
      method: of training.
      frames: what stays fixed of each layer, by name, in dataflow order.
      constants: leaves of the original params that are read and cannot be trained, by path.
    """

    function: QuantizedFunction
    recipe: Recipe
    method: Method
    frames: Mapping[str, Frame]
    constants: Mapping[str, jax.Array]

    def __call__(self, params: Mapping[str, Any], x: Any, key: Any = None) -> Any:
        """Evaluates the network on quantized values, differentiably.

        Args:
          params: of `prepare`, all of them float arrays: `layers`, by name, and `rest`.
          x: an input like the ones of the original function, of any batch size.
          key: random key of the draws of a stochastic method; without one it is deterministic.

        Returns:
          What the original function returns.

        Raises:
          ValueError: the function has other layers at this input's shape than were quantized.
        """
        network = self.function.network(x)
        program = network.program(("training", self), partial(self._run, network))
        return program(params, x, key)

    def constrain(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Brings params back to where the method wants them, after an update.

        BinaryConnect clips the kernels of one bit to [−1, 1]; the other methods change nothing.
        """
        layers = {
            name: self.frames[name].training.constrain(layer)
            for name, layer in params["layers"].items()
        }
        return {**params, "layers": layers}

    def _run(self, network: Network, params: Mapping[str, Any], x: Any, key: Any) -> Any:
        keys: dict[str, Any] = dict.fromkeys(self.frames)
        if key is not None:
            keys = dict(zip(keys, jax.random.split(key, len(keys)), strict=True))

        def layer_rule(site: Site, layer: Params, x: jax.Array) -> jax.Array:
            name = site.layer.name
            frame = self.frames[name]
            y = self._multiply(site.layer.operation, frame, layer, x, keys[name])
            bias = self._bias(frame, params["layers"], layer)
            y = y + along_channels(site.layer.operation, bias, y.ndim)
            if self.method.gradient_bits is not None:
                y = quantize_gradient(y, self.method.gradient_bits)
            return site.movement(self._projected(frame, layer, "outputs", y))

        def activated_rule(site: Site, layer: Params, y: jax.Array) -> jax.Array:
            return self._projected(self.frames[site.layer.name], layer, "activated", y)

        rules = Rules(layer_rule, activated_rule, {}, real_value)
        env = bind(network, {"rest": {**params["rest"], **self.constants}}, x)
        evaluate(schedule(network), env, params["layers"], rules)
        return outputs_of(network, env, rules)

    def _multiply(
        self, operation: Linear, frame: Frame, layer: Params, x: jax.Array, key: Any
    ) -> jax.Array:
        """The layer without its bias."""
        kernel = layer["kernel"]
        if frame.weights is not None:
            format = self._stepped(frame, layer, "weights", kernel)
            kernel = frame.training.forward(layer, format, key)
        if isinstance(frame.inputs, Signs):
            return _product_of_signs(operation, Signs(layer["shift"]), frame.width, kernel, x)
        x = self._projected(frame, layer, "inputs", x.astype(jnp.float32))
        return operation.evaluate(x, operation.from_matrix(kernel))

    def _bias(self, frame: Frame, layers: Mapping[str, Params], layer: Params) -> jax.Array:
        """The bias as it will be: rounded to the accumulator's scale s_w·s_x, where that is one."""
        step = self._input_step(frame, layers, layer)
        if frame.weights is None or step is None or frame.weights.step.shape[1] > 1:
            return layer["bias"]
        format = self._stepped(frame, layer, "weights", layer["kernel"])
        scale = frame.training.scale(layer, format) * jnp.abs(step)
        groups, _, channels = layer["kernel"].shape
        unit = lax.stop_gradient(jnp.broadcast_to(scale, (groups, 1, channels)).reshape(-1))
        return straight_through(unit * jnp.round(layer["bias"] / unit), layer["bias"])

    def _input_step(
        self, frame: Frame, layers: Mapping[str, Params], layer: Params
    ) -> jax.Array | None:
        if frame.source is None:
            return layer.get(STEPS["inputs"])
        source = layers[frame.source]
        return source.get(STEPS["activated"], source.get(STEPS["outputs"]))

    def _projected(self, frame: Frame, layer: Params, field: str, x: jax.Array) -> jax.Array:
        format = self._stepped(frame, layer, field, x[:1])
        return x if format is None else format.project(x)

    def _stepped(self, frame: Frame, layer: Params, field: str, one: jax.Array) -> Any:
        """A format with the step of the moment; `one` has the values of one example."""
        format = getattr(frame, field)
        if format is None or STEPS[field] not in layer:
            return format
        step = layer[STEPS[field]]
        if not self.method.learns_steps:
            return dataclasses.replace(format, scale=lax.stop_gradient(step))
        step = learned_step(step, one.size // step.size, greatest_code(format))
        return dataclasses.replace(format, scale=step)


def _product_of_signs(
    operation: Linear, inputs: Signs, width: float, kernel: jax.Array, x: jax.Array
) -> jax.Array:
    """K·Σ sign(x − t)·ŵ: the gradient passes the sign where |x − t| ≤ width."""
    left, centered = center(operation, inputs, x)
    inside = jnp.clip(centered / width, -1, 1)
    codes = straight_through(signs(inside), inside)
    y = left.evaluate(codes, left.from_matrix(kernel))
    return y * magnitudes(left, centered)


def greatest_code(format: Any) -> int:
    """The greatest magnitude of a code less the zero point."""
    zero_point, low, high = map(np.asarray, (format.zero_point, format.qmin, format.qmax))
    return int(np.maximum(high - zero_point, zero_point - low).max())
