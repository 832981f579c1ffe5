"""Views of examples, one example after the other by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.tuning import views

SHAPES = {"NHWC": (6, 16, 16, 3), "NCHW": (6, 3, 16, 16)}


@pytest.mark.parametrize("layout", SHAPES)
def test_images_are_mirrored_shifted_and_blended(layout: str):
    x = np.random.default_rng(0).normal(size=SHAPES[layout]).astype(np.float32)
    view = views.draw(np.random.default_rng(1), x)
    assert view.corners.min() >= 0 and view.corners.max() <= 4 and view.mirrored.any()
    assert (view.shares == 1).any() and (view.shares < 1).any()
    moved = []
    for image, mirrored, corner in zip(x, view.mirrored, view.corners, strict=True):
        image = image if layout == "NHWC" else image.transpose(1, 2, 0)
        image = image[:, ::-1] if mirrored else image
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        image = padded[corner[0] :, corner[1] :][:16, :16]
        moved.append(image if layout == "NHWC" else image.transpose(2, 0, 1))
    moved = np.stack(moved)
    share = view.shares.reshape(-1, 1, 1, 1)
    expected = share * moved + (1 - share) * moved[view.partners]
    np.testing.assert_allclose(views.show(view, x), expected, rtol=1e-5, atol=1e-6)


def test_arrays_that_are_no_images_are_blended_alone_and_tokens_stay():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5)).astype(np.float32)
    view = views.draw(rng, x)
    share = view.shares[:, None]
    expected = share * x + (1 - share) * x[view.partners]
    np.testing.assert_allclose(views.show(view, x), expected, rtol=1e-6)
    tokens = {"tokens": jnp.arange(12).reshape(6, 2), "x": x}
    found = views.show(view, tokens)
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["tokens"], tokens["tokens"])
