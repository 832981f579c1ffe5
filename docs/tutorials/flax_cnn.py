# %% [markdown]
# # A Flax network from float to ONNX
#
# A small convolutional network learns handwritten digits, is quantized to 8 and to 4 bits without
# labels, runs with integers, is saved, and leaves JAX as an ONNX file. It takes half a minute on a
# laptop. You need `pip install "qjax[all]"`.

# %%
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import linen as nn
from sklearn.datasets import load_digits

import qjax

# %% [markdown]
# ## The network
#
# Any pure function `apply_fn(params, x)` will do. This one is `model.apply` of a Flax module.


# %%
class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv2")(x))
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1280], order[1280:]
model = CNN()

# %% [markdown]
# Training is whatever you do today. Here it is plain gradient descent with momentum.


# %%
@jax.jit
def step(state, batch):
    def loss(params):
        log_p = jax.nn.log_softmax(model.apply(params, batch[0]))
        return -jnp.take_along_axis(log_p, batch[1][:, None], 1).mean()

    params, velocity = state
    velocity = jax.tree.map(lambda v, g: 0.9 * v - 0.05 * g, velocity, jax.grad(loss)(params))
    return jax.tree.map(jnp.add, params, velocity), velocity


params = model.init(jax.random.key(0), images[:1])
state = (params, jax.tree.map(jnp.zeros_like, params))
random = np.random.default_rng(1)
for _ in range(600):
    rows = random.choice(train, 64)
    state = step(state, (images[rows], digits.target[rows]))
params = state[0]


def accuracy(apply_fn, params):
    """Percentage of the test images."""
    return 100 * float((apply_fn(params, images[test]).argmax(1) == digits.target[test]).mean())


in_float = accuracy(model.apply, params)
print(f"float: {in_float:.1f} % of {len(test)} test images")

# %% [markdown]
# ## What qjax sees
#
# A layer is a convolution or a dot product with its bias, its batch norm if there is one, and its
# activation. It has the name of its kernel in `params`.

# %%
for layer in qjax.trace(model.apply, params, images[:1]):
    print(layer.name, layer.kind, layer.kernel_shape, layer.activation)

# %% [markdown]
# ## Eight bits
#
# Calibration takes training images and no labels. The result is a function and its params again,
# and a report. The output of a layer is quantized before its activation.

# %%
q = qjax.quantize(model.apply, params, images[train], bits=8)
print(q.report)

# %%
with_8_bits = accuracy(q.apply_fn, q.params)
print(f"8 bits: {with_8_bits:.1f} %")

# %% [markdown]
# ## Four bits, and a layer that keeps eight
#
# A recipe says what to do. `overrides` are by glob on the names of layers; a pattern that matches
# nothing is an error.

# %%
q4 = qjax.quantize(model.apply, params, images[train], bits=4)
recipe = qjax.recipe(4, overrides={"*conv1": {"bits": 8}})
mixed = qjax.quantize(model.apply, params, images[train], recipe)
with_4_bits = accuracy(q4.apply_fn, q4.params)
with_mixed_bits = accuracy(mixed.apply_fn, mixed.params)
print(f"4 bits: {with_4_bits:.1f} %, first layer at 8: {with_mixed_bits:.1f} %")

# %% [markdown]
# ## Integers
#
# `q.apply_fn` computes in float with values that lie on the grids of the codes. `qjax.integer`
# computes with the codes themselves: int8 products, int32 sums, a rounded shift.

# %%
integer = qjax.integer(q)
same = bool((integer(q.params, images[test]) == q.apply_fn(q.params, images[test])).all())
print("integers give the same logits to the last bit:", same)
print(qjax.cost(q))

# %% [markdown]
# ## Saving, and leaving JAX
#
# An artifact is a folder with the codes at their true width and a manifest that is readable. An
# ONNX file runs wherever ONNX Runtime does, without JAX. On a processor without int8 dot
# instructions its sums of products saturate unless it is told to be precise.

# %%
folder = tempfile.mkdtemp()
qjax.save(f"{folder}/digits", q)
again = qjax.load(f"{folder}/digits", model.apply)
assert (again.apply_fn(again.params, images) == q.apply_fn(q.params, images)).all()

exported = qjax.to_onnx(q, images[:1])
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession(exported.SerializeToString(), options)
(logits,) = session.run(None, {session.get_inputs()[0].name: images[test]})
in_onnx = 100 * float((logits.argmax(1) == digits.target[test]).mean())
print(f"ONNX Runtime: {in_onnx:.1f} %, {exported.ByteSize():,} bytes")

# %% [markdown]
# From here: [reading a report](reading_a_report.py), [layers and formats](../quantizing.md), and
# [running it in other runtimes](../onnx.md).
