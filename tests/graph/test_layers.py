"""Finding the layers of every model of the table, and refusing what cannot be rewritten."""

from typing import Any

import jax
import jax.numpy as jnp
import models
import pytest
from jax import lax

import qjax
from qjax.graph.layers import Network, check_layers, find_layers

each_case = pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.id)


@each_case
def test_layers_of_every_model(case: models.Case):
    found = qjax.trace(case.apply_fn, case.params, case.x)
    fields = models.Expected._fields
    assert tuple(tuple(getattr(layer, f) for f in fields) for layer in found) == case.expected


@pytest.mark.parametrize("case", models.REFUSED, ids=lambda case: case.id)
def test_what_cannot_be_rewritten_is_refused(case: models.Refused):
    with pytest.raises(ValueError, match=case.match):
        qjax.trace(case.apply_fn, case.params, case.x)
    with pytest.raises(ValueError, match=case.match):
        qjax.quantize(case.apply_fn, case.params, case.x)


@pytest.mark.parametrize("case", models.refused_loops(), ids=lambda case: case.id)
def test_a_refusal_names_the_layer_and_the_way_out(case: models.Refused):
    message = r"layer 'w' stands inside `\w+`, where it cannot be rewritten; \w+ .*\."
    with pytest.raises(ValueError, match=message):
        qjax.trace(case.apply_fn, case.params, case.x)


def rebatched(x: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), x)


def outline(network: Network) -> list[tuple[Any, ...]]:
    """All of a network that must not depend on the number of examples."""
    return [
        (
            *(site.layer.name, site.layer.kind, site.layer.activation, site.layer.macs),
            site.layer.operation,
            [operation.primitive for operation in site.operations],
            [e.primitive.name for moves in site.movement.equations for e in moves.equations],
            [equation.primitive.name for equation in site.activating],
        )
        for site in network.sites
    ]


@each_case
def test_layers_do_not_depend_on_the_number_of_examples(case: models.Case):
    # 4, 8 and 10 are also numbers of channels in the table: a bad moment to mistake an axis.
    first, *others = (
        outline(find_layers(case.apply_fn, case.params, rebatched(case.x, size)))
        for size in (3, 1, 4, 8, 10)
    )
    assert first
    assert others == [first] * len(others)


def test_shapes_are_enough_to_trace():
    case = models.CASES[0]
    structs = jax.eval_shape(lambda tree: tree, (case.params, case.x))
    assert qjax.trace(case.apply_fn, *structs) == qjax.trace(case.apply_fn, case.params, case.x)


def test_shapes_and_multiplications_of_a_strided_convolution():
    [case] = [case for case in models.CASES if case.id == "plain_nchw"]
    first, second = qjax.trace(case.apply_fn, case.params, case.x)
    assert (first.input_shape, first.output_shape) == ((4, 3, 8, 8), (4, 8, 4, 8))
    assert first.macs == 8 * 4 * 8 * 3 * 3 * 3
    assert second.output_shape == (4, 8, 2, 6)
    assert second.macs == 8 * 2 * 6 * 4 * 3 * 3


def test_products_of_two_activations_are_skipped_and_listed():
    [case] = [case for case in models.CASES if case.id == "linen_transformer"]
    skipped = find_layers(case.apply_fn, case.params, case.x).skipped
    assert [skip.primitive for skip in skipped] == ["dot_general"] * 2
    assert {skip.reason for skip in skipped} == {"a product of two activations"}
    assert all(len(skip.shapes) == 2 for skip in skipped)


W = jnp.ones((4, 4))


def names_of(apply_fn: Any, params: Any) -> list[str]:
    return [layer.name for layer in qjax.trace(apply_fn, params, jnp.ones((2, 4)))]


def test_a_layer_that_no_output_needs_is_no_layer():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        _ = x @ params["unused"]
        return x @ params["used"]

    assert names_of(apply_fn, {"unused": W, "used": W}) == ["used"]


def test_a_kernel_computed_from_params_has_the_name_of_its_largest_leaf():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ (params["direction"] * params["length"][None])

    assert names_of(apply_fn, {"direction": W, "length": W[0]}) == ["direction"]


def test_a_folder_is_the_name_where_it_holds_one_kernel():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = x @ params["params"]["a"]["kernel"] @ params["params"]["b"]["one"]
        return x @ params["params"]["b"]["two"]

    params = {"params": {"a": {"kernel": W}, "b": {"one": W, "two": W}}}
    assert names_of(apply_fn, params) == ["a", "b/one", "b/two"]


def left_convolution(params: Any, x: jax.Array) -> jax.Array:
    return lax.conv(params["w"], x, (1, 1), "VALID")


def grouped_by_batch(params: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", batch_group_count=2)


def embedded(params: Any, x: jax.Array) -> jax.Array:
    return params["w"][x.astype(jnp.int32)]


def experts(params: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("ni,nio->no", x, params["w"][x.argmax(-1)])


def ragged(params: Any, x: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, params["w"], jnp.array([2, 4], jnp.int32))


@pytest.mark.parametrize(
    ("apply_fn", "kernel", "x", "reasons"),
    [
        (left_convolution, (1, 2, 5, 5), (3, 2, 2, 2), ["its kernel is the first operand"]),
        (grouped_by_batch, (4, 3, 3, 3), (2, 3, 5, 5), ["its kernel is the first operand"]),
        (embedded, (5, 2), (6,), ["rows of a table, chosen"]),
        (experts, (3, 3, 2), (6, 3), ["rows of a table, chosen", "its kernel is chosen"]),
        (ragged, (2, 3, 4), (6, 3), ["a kernel for every group of examples"]),
    ],
)
def test_what_stays_in_float_is_listed(
    apply_fn: Any, kernel: tuple[int, ...], x: tuple[int, ...], reasons: list[str]
):
    network = find_layers(apply_fn, {"w": jnp.ones(kernel)}, jnp.ones(x))
    assert not network.sites
    found = [skip.reason for skip in network.skipped]
    assert all(map(str.startswith, found, reasons)) and len(found) == len(reasons)
    with pytest.raises(ValueError, match=f"no layer to quantize.*In float: .*{reasons[-1]}"):
        check_layers(network)


def test_a_product_with_what_is_computed_without_params_is_skipped():
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.eye(4) @ params["w"]

    network = find_layers(apply_fn, {"w": W}, jnp.ones((2, 4)))
    assert [site.layer.name for site in network.sites] == ["w"]
    assert [skip.reason for skip in network.skipped] == ["its kernel is computed without params"]


@pytest.mark.parametrize(
    ("tail", "steps"),
    [
        (lambda z, p: z * p["scale"][None] + p["shift"][None], ["mul", "add"]),
        (lambda z, p: (z - p["shift"][None]) / p["scale"][None], ["sub", "div"]),
        (lambda z, p: 2.0 - z, ["sub"]),
        (lambda z, p: jax.nn.relu(z) + p["shift"][None], []),
        (lambda z, p: z.sum(1) + p["shift"], []),
        (lambda z, p: p["scale"][None] / z, []),
        (lambda z, p: z + z, []),
        (lambda z, p: z + p["position"], []),
        (lambda z, p: (z + p["shift"][None]) * z, []),
    ],
)
def test_the_chain_is_the_affine_operations_per_channel(tail: Any, steps: list[str]):
    params = {"w": W, "scale": 2 * W[0], "shift": W[0], "position": jnp.ones((4, 1))}
    network = find_layers(lambda p, x: tail(x @ p["w"], p), params, jnp.ones((4, 4)))
    [site] = network.sites
    assert [operation.primitive for operation in site.operations] == steps
