"""The benchmarks of calibration: `benchmark.py search` and `benchmark.py growth`."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measure import device, in_own_process, timed

import qjax
from pretrained.resnet import resnet_cifar, resnet_imagenet
from qjax.fit.moments import moments
from qjax.fit.observers import observe_stacked
from qjax.fit.samples import KernelSample, kernel_loss
from qjax.fit.sampling import MOMENT_PATCHES, patch_stride
from qjax.fit.search import Candidates, least
from qjax.formats.affine import affine_qparams, fake_quant
from qjax.graph.operation import Linear
from qjax.objectives.errors import OUTPUT_MSE

BATCH = 128
SPEC = qjax.QuantSpec(bits=8)


def add_search(commands: Any) -> None:
    """Adds the command `search`."""
    text = "clipping ranges of ResNet-20's weights, in closed form and by trying them out"
    parser = commands.add_parser("search", help=text, description=text)
    add = parser.add_argument
    add("--images", type=int, default=1024, metavar="N", help="calibration images (%(default)s)")
    add("--candidates", type=int, default=100, metavar="N", help="per range (%(default)s)")
    add(
        "--loop-candidates",
        type=int,
        metavar="N",
        help="time the loop on so many candidates and scale its time to all (all)",
    )
    add("--repeats", type=int, default=3, metavar="N", help="rounds for the medians (%(default)s)")
    add("--json", action="store_true", help="end with the results as one line of JSON")
    parser.set_defaults(run=run_search)


def run_search(arguments: argparse.Namespace) -> None:
    """Measures each variant in a process of its own and prints the table."""
    arguments.loop_candidates = arguments.loop_candidates or arguments.candidates
    closed, loop = (in_own_process(f, arguments) for f in (time_closed_form, time_loop))
    rows = {
        "weight ranges in closed form": closed,
        "weight ranges by a loop of convolutions": loop,
        "all of qjax.quantize": in_own_process(time_quantize, arguments),
    }
    print(
        f"ResNet-20, 8 bits, {arguments.images} images of 32x32, {arguments.candidates} candidates "
        f"per range, {jax.devices()[0].device_kind}\n"
    )
    print(f"{'':40}{'first call':>12}{'later calls':>13}{'peak memory':>13}")
    for name, row in rows.items():
        print(f"{name:40}{row.first:>10.1f} s{row.steady:>11.2f} s{row.peak / 1e6:>10.0f} MB")
    speedup = loop.steady / closed.steady
    difference = float(np.max(np.abs(np.divide(loop.losses, closed.losses) - 1)))
    print(
        f"\nThe closed form, second moments included, is {speedup:.1f}x as fast as the loop. It "
        f"samples {MOMENT_PATCHES:,}\npatches per layer; on all of them the losses of both differ "
        f"by {difference:.0e}."
    )
    if arguments.loop_candidates != arguments.candidates:
        print(
            f"The loop was timed on {arguments.loop_candidates} candidates, its time scaled to "
            f"{arguments.candidates}."
        )
    print(f"First calls include compilation; later calls are medians of {arguments.repeats}.")
    if arguments.json:
        fields = {name: row._asdict() | {"losses": None} for name, row in rows.items()}
        print(json.dumps({"rows": fields, "speedup": speedup, "difference": difference}))


def resnet20() -> tuple[Callable[..., Any], Any]:
    """A ResNet-20 of random weights: time does not depend on their values."""
    model = resnet_cifar(20)
    return model.apply, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


class Layer(NamedTuple):
    """A layer of ResNet-20 with random numbers of the right shapes.

    Attributes:
      operation: what it does.
      kernel: float32[groups, patch, channels].
      inputs: its input on all batches of images, float32[batches, examples, ...].
    """

    operation: Linear
    kernel: jax.Array
    inputs: jax.Array


def layers(images: int) -> Iterator[Layer]:
    """The layers of ResNet-20, one at a time."""
    shape = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
    rng = np.random.default_rng(0)
    batches = -(-images // BATCH)
    examples = -(-images // batches)
    for layer in qjax.trace(*resnet20(), shape):
        kernel = rng.normal(size=layer.operation.matrix_shape).astype(np.float32)
        x = rng.standard_normal((batches, examples, *layer.input_shape[1:]), np.float32)
        np.maximum(x, 0, out=x)
        yield Layer(layer.operation, jnp.asarray(kernel), jnp.asarray(x))


def time_closed_form(arguments: argparse.Namespace) -> tuple[float, float, list[float]]:
    """The second moments of every layer's input, and the search over them."""
    candidates = Candidates(arguments.candidates, refinements=0)

    def find(layer: Layer) -> Any:
        stride = patch_stride(layer.operation, layer.inputs, MOMENT_PATCHES)
        hessian = second_moment(layer.operation, stride, layer.inputs)
        return best_range(layer.kernel, hessian, candidates)

    seconds, losses = [], []
    for layer in layers(arguments.images):
        seconds.append(timed(partial(find, layer), arguments.repeats))
        error = clipping_error(layer.kernel, 0.5)
        hessian = second_moment(layer.operation, 1, layer.inputs)
        losses.append(float(jnp.sum(kernel_loss(error, hessian))))
    first, steady = map(sum, zip(*seconds, strict=True))
    return first, steady, losses


@partial(jax.jit, static_argnums=(0, 1))
def second_moment(operation: Linear, stride: int, inputs: jax.Array) -> jax.Array:
    """E[x xᵀ] of every `stride`-th patch of a layer's input."""
    return observe_stacked(moments(operation, stride), inputs).hessian


@partial(jax.jit, static_argnums=2)
def best_range(kernel: jax.Array, hessian: jax.Array, candidates: Candidates) -> Any:
    """The format of a kernel with the least error of the output."""
    return least(OUTPUT_MSE, KernelSample(kernel, SPEC, hessian), SPEC, candidates)


def time_loop(arguments: argparse.Namespace) -> tuple[float, float, list[float]]:
    """A convolution of every image per candidate and layer, compiled once per shape."""
    alphas = [(i + 1) / arguments.candidates for i in range(arguments.loop_candidates)]
    seconds, losses = [], []
    for layer in layers(arguments.images):
        run = partial(lambda layer: [output_loss(layer, alpha) for alpha in alphas], layer)
        first, _ = timed(lambda layer=layer: output_loss(layer, 1.0), 1)
        seconds.append((first, timed(run, arguments.repeats)[1]))
        losses.append(float(jnp.sum(output_loss(layer, 0.5))))
    first, steady = map(sum, zip(*seconds, strict=True))
    steady *= arguments.candidates / arguments.loop_candidates
    return first + steady, steady, losses


def clipping_error(kernel: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """What quantization to the clipping range α·max|w| per output channel changes in a kernel."""
    largest = alpha * jnp.max(jnp.abs(kernel), axis=1, keepdims=True)
    return fake_quant(kernel, affine_qparams(-largest, largest, SPEC)) - kernel


def output_loss(layer: Layer, alpha: float) -> jax.Array:
    """The mean squared output error of one candidate, per output channel."""
    losses = [_batch_loss(layer.operation, layer.kernel, x, alpha) for x in layer.inputs]
    return sum(losses[1:], losses[0]) / len(losses)


@partial(jax.jit, static_argnums=0)
def _batch_loss(operation: Linear, kernel: jax.Array, x: jax.Array, alpha: float) -> jax.Array:
    y = operation.apply(x, operation.from_matrix(clipping_error(kernel, alpha)))
    channels = {axis % y.ndim for axis in operation.channel_axes}
    return jnp.mean(jnp.square(y), [axis for axis in range(y.ndim) if axis not in channels])


def time_quantize(arguments: argparse.Namespace) -> tuple[float, float, list[float]]:
    """All of the transformation with its default recipe."""
    apply_fn, params = resnet20()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((arguments.images, 32, 32, 3), np.float32)
    recipe = qjax.recipe(8, grid_size=arguments.candidates, refinements=0)
    seconds = timed(lambda: qjax.quantize(apply_fn, params, images, recipe).params, 1)
    return *seconds, []


def add_growth(commands: Any) -> None:
    """Adds the command `growth`."""
    text = "time and memory of quantizing, by images, candidates and width of the network"
    parser = commands.add_parser("growth", help=text, description=text)
    add = parser.add_argument
    add("--images", nargs="+", type=int, default=[1024, 256, 512, 2048], metavar="N")
    add("--candidates", nargs="+", type=int, default=[32, 128], metavar="N")
    add(
        "--filters",
        nargs="*",
        type=int,
        default=[16, 32, 64],
        metavar="N",
        help="filters of stage 1",
    )
    add("--repeats", type=int, default=1, metavar="N", help="later calls, 0: none (%(default)s)")
    add("--bits", type=int, default=4, metavar="N", help="width of all tensors (%(default)s)")
    add("--resnet18", action="store_true", help="measure the full-width ResNet-18 as well")
    parser.set_defaults(run=run_growth)


def run_growth(arguments: argparse.Namespace) -> None:
    """Varies one thing at a time, the others at their first value, each in its own process."""
    networks = [*arguments.filters, *([None] if arguments.resnet18 else [])]
    if not networks:
        raise SystemExit("`--filters` must have a number, or `--resnet18` be given.")
    varied = {"images": arguments.images, "candidates": arguments.candidates, "filters": networks}
    first = {name: values[0] for name, values in varied.items()}
    rows = [first]
    rows += [first | {name: value} for name, values in varied.items() for value in values[1:]]
    print(f"{arguments.bits} bits, images of 32x32, {device()}\n")
    print(
        f"{'network':20}{'images':>8}{'candidates':>12}{'first call':>14}{'later call':>13}"
        f"{'peak':>12}"
    )
    for row in rows:
        measured = in_own_process(
            time_scaled, argparse.Namespace(bits=arguments.bits, repeats=arguments.repeats, **row)
        )
        name = f"ResNet-20, {row['filters']} filters" if row["filters"] else "ResNet-18"
        later = f"{measured.steady:.1f} s" if arguments.repeats else ""
        print(
            f"{name:24}{row['images']:>4}{row['candidates']:>12}{measured.first:>12.1f} s"
            f"{later:>13}{measured.peak / 1e6:>9.0f} MB"
        )


def time_scaled(arguments: argparse.Namespace) -> tuple[float, float, list[float]]:
    """Times qjax.quantize of a network of random weights."""
    filters = arguments.filters
    if filters is None:
        model = resnet_imagenet(18, num_classes=10, large_stem=False)
    else:
        stages = (filters, 2 * filters, 4 * filters)
        model = dataclasses.replace(resnet_cifar(20), stage_filters=stages, parent=None)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((arguments.images, 32, 32, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images[:1])
    recipe = qjax.recipe(arguments.bits, grid_size=arguments.candidates)
    first, steady = timed(
        lambda: qjax.quantize(model.apply, params, images, recipe).params, arguments.repeats
    )
    return first, steady, []
