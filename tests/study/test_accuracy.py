"""Top-1 accuracy."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax


def test_top1_counts_every_image_once():
    labels = np.arange(10) % 3
    logits = np.eye(3, dtype=np.float32)[np.where(np.arange(10) < 7, labels, (labels + 1) % 3)]
    seen = []
    accuracy = qjax.top1(
        lambda params, x: x * params,
        jnp.ones((1, 1)),
        logits,
        labels,
        batch_size=4,
        progress=lambda item, done, total: seen.append((done, total)),
    )
    assert accuracy == pytest.approx(70.0)
    assert seen == [(4, 10), (8, 10), (10, 10)]
    with pytest.raises(ValueError, match="got 10 images and 9 labels"):
        qjax.top1(lambda params, x: x, None, logits, labels[:9])
