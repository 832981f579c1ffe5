"""The report: a record per layer, and a table that fits a terminal."""

import dataclasses
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import LayerReport, QuantSpec, Recipe, Report
from qjax.graph.layers import Skipped

RECORD = LayerReport(
    name="block0/conv1",
    kind="conv",
    activation="relu",
    kernel_shape=(3, 3, 16, 32),
    input_shape=(8, 8, 16),
    output_shape=(8, 8, 32),
    weight_bits=4,
    input_bits=8,
    output_bits=None,
    weight_scale=(0.01, 0.02),
    input_scale=0.1,
    input_zero_point=0,
    output_scale=None,
    output_zero_point=None,
    weight_sqnr_db=21.345,
    output_sqnr_db=math.inf,
    weight_clip=0.9,
    input_clip=1.0,
    output_clip=None,
    macs=294912,
    bytes_float=18560,
    bytes_quantized=2688,
)
CHEAP = Recipe().naive()


def report(*records: LayerReport, skipped: tuple[Skipped, ...] = ()) -> Report:
    return Report(records, Recipe(), skipped)


def test_a_row_says_what_was_done():
    header, rule, row, second_rule, total = str(report(RECORD)).splitlines()
    assert (
        header.split() == "layer kind kernel bits w/i/o activation w dB out dB MACs bytes".split()
    )
    assert set(rule) == set(second_rule) == {"─"}
    assert row.split() == [
        *("block0/conv1", "conv", "3×3×16×32", "4/8/–", "relu"),
        *("21.3", "∞", "295k", "18.6k", "→", "2.69k"),
    ]
    assert total.split() == ["1", "layers", "295k", "18.6k", "→", "2.69k"]


def test_the_last_line_adds_up():
    second = dataclasses.replace(RECORD, macs=5_088, bytes_float=1_440, bytes_quantized=312)
    assert str(report(RECORD, second)).splitlines()[-1].split() == [
        *("2", "layers", "300k", "20k", "→", "3k"),
    ]


@pytest.mark.parametrize("width", [98, 80, 60, 40])
def test_the_table_fits_a_narrow_terminal(width: int):
    text = report(dataclasses.replace(RECORD, name="encoder/block0/conv1")).text(width)
    assert max(map(len, text.splitlines())) <= width
    header, _, row, *_ = text.splitlines()
    assert row.split()[0].endswith("block0/conv1")
    assert "bits w/i/o" in header and "4/8/–" in row


# Of a MobileNet: 52 layers whose names do not fit next to all columns.
LARGE = [
    dataclasses.replace(RECORD, name=name, kind="depthwise_conv", kernel_shape=(3, 3, 1, 1280))
    for name in (
        "feature_extractor/stem/convolution",
        *(
            f"feature_extractor/inverted_residual_block{block}/{part}"
            for block in range(17)
            for part in ("expansion", "depthwise_convolution", "projection")
        ),
    )
]


@pytest.mark.parametrize("width", [80, 100])
def test_names_of_a_large_network_are_grouped_and_whole(width: int):
    lines = report(*LARGE).text(width).splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    assert lines[2:5] == ["feature_extractor/", *lines[3:5]]
    assert lines[3].startswith("  stem/convolution ")
    assert lines[4:6] == ["  inverted_residual_block0/", *lines[5:6]]
    assert lines[5].startswith("    expansion  ")
    assert sum(line.startswith("    depthwise_convolution ") for line in lines) == 17
    assert lines[-1].startswith("52 layers")
    assert {"layer", "w", "out", "dB"} <= set(lines[0].split())


def test_errors_of_layers_alone_are_said_to_be_that():
    note = "out dB: of each layer alone, its input being that of the float network"
    alone = dataclasses.replace(Recipe(), sequential=False)
    assert str(Report([RECORD], alone, ())).splitlines()[-1] == note
    assert note not in str(report(RECORD))
    unknown = dataclasses.replace(RECORD, output_sqnr_db=None)
    assert note not in str(Report([unknown], alone, ()))


names = st.text("abc/_0123456789", min_size=1, max_size=200)
windows, channels = st.integers(1, 11), st.integers(1, 4096)
records = st.builds(
    lambda name, kind, activation, kernel, macs: dataclasses.replace(
        RECORD,
        name=name,
        kind=kind,
        activation=activation,
        kernel_shape=kernel,
        macs=macs,
        bytes_float=4 * math.prod(kernel),
        bytes_quantized=math.prod(kernel),
    ),
    names,
    st.sampled_from(["conv", "depthwise_conv", "grouped_conv", "dense", "grouped_dense"]),
    st.sampled_from(["none", "relu", "relu6", "other"]),
    st.tuples(channels, channels) | st.tuples(windows, windows, channels, channels),
    st.integers(0, 10**11),
)


@hypothesis.given(st.lists(records, min_size=1, max_size=4))
def test_the_table_is_at_most_100_columns_wide(rows: list[LayerReport]):
    lines = str(report(*rows)).splitlines()
    assert max(map(len, lines)) <= 100
    for record, line in zip(rows, lines[2:-2], strict=True):
        shown = line.split()[0]
        assert shown == record.name or (shown[0] == "…" and record.name.endswith(shown[1:]))
        assert len(shown) >= min(len(record.name), 6), "enough of a name to know the layer by"


def test_what_stayed_in_float_is_listed_below_the_table():
    skip = Skipped("dot_general", ((64, 2, 5, 4), (64, 2, 5, 4)), "a product of two activations")
    assert str(report(RECORD, skipped=(skip,))).splitlines()[-1] == (
        "in float: dot_general of 64×2×5×4 and 64×2×5×4: a product of two activations"
    )


def test_a_long_line_about_what_stayed_in_float_is_wrapped():
    shape = (128, 1024, 1024, 16)
    skip = Skipped("conv_general_dilated", (shape, shape), "its kernel is computed without params")
    lines = str(report(RECORD, skipped=(skip,))).splitlines()
    assert max(map(len, lines)) <= 100
    assert " ".join(lines[5:]).split()[-6:] == skip.reason.split()


def test_a_report_is_a_sequence():
    second = dataclasses.replace(RECORD, name="head")
    both = report(RECORD, second)
    assert len(both) == 2 and list(both) == [RECORD, second]
    assert both[-1] is second and both[:1] == (RECORD,)
    assert both == report(RECORD, second) != report(RECORD)


def test_records_of_a_quantized_network():
    rng = np.random.default_rng(0)
    w, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 8), (8, 5)))
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    weights = QuantSpec(4)
    recipe = dataclasses.replace(CHEAP, weights=weights, overrides={"v": {"outputs": None}})
    q = qjax.quantize(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], {"w": w, "v": v}, x, recipe)
    first, second = q.report
    assert q.report.recipe is recipe
    assert (first.name, first.kind, first.activation) == ("w", "dense", "relu")
    assert (first.kernel_shape, first.output_shape, first.macs) == ((6, 8), (8,), 48)
    assert (first.weight_bits, first.input_bits, first.output_bits) == (4, 8, 8)
    assert (second.output_bits, second.output_scale, second.output_zero_point) == (None,) * 3
    assert first.bytes_float == 4 * (6 * 8 + 8)
    # codes, 8 scales and zero points of the kernel, one of input and of output, int32 bias
    assert first.bytes_quantized == 6 * 8 // 2 + 8 * (4 + 4) + 2 * (4 + 4) + 8 * 4
    scales = np.abs(w).max(0) / weights.qmax
    assert first.weight_scale == pytest.approx((scales.min(), scales.max()), rel=1e-6)
    w_hat = scales * np.round(np.asarray(w) / scales)
    np.testing.assert_allclose(
        first.weight_sqnr_db, 10 * np.log10(np.sum(w**2) / np.sum((w - w_hat) ** 2)), rtol=1e-4
    )

    def unsigned(values: Any, scale: Any, zero_point: Any) -> Any:
        return scale * np.clip(np.rint(values / scale), -zero_point, 255 - zero_point)

    x_hat = unsigned(np.asarray(x), first.input_scale, first.input_zero_point)
    z_hat = unsigned(x_hat @ w_hat, first.output_scale, first.output_zero_point)
    y, y_hat = (np.maximum(z, 0) for z in (np.asarray(x @ w), z_hat))
    expected = 10 * np.log10(np.sum(y**2) / np.sum((y - y_hat) ** 2))
    np.testing.assert_allclose(first.output_sqnr_db, expected, rtol=1e-3)
    assert first.input_scale == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-6)
    assert (first.weight_clip, first.input_clip, first.output_clip) == (1.0, 1.0, 1.0)
    assert second.output_clip is None
