# %% [markdown]
# # Reading a report
#
# A network loses accuracy at 3 bits. Where, and what helps? The network is `resnet20-digits`, which
# comes with qjax: a ResNet-20 on 8x8 images.

# %%
import pretrained
import qjax
from pretrained import datasets

model = pretrained.load("resnet20-digits")
images = datasets.load("digits", "train").images
calibration = model.preprocess(datasets.calibration_draw(images, 256, seed=0))
test = datasets.load("digits", "test")

q = qjax.quantize(model.apply_fn, model.params, calibration, bits=3)
print(q.report)

# %% [markdown]
# A row is a layer, in the order of evaluation.
#
# * **bits w/i/o** are the widths of its weights, input and output; `–` is left in float.
# * **w dB** is the signal to noise ratio of its kernel. Six decibels are one bit. With the default
#   recipe the kernel is refitted to what the layers before it left over, so that it is further
#   from the float kernel than rounding alone would put it.
# * **out dB** is that of its output after the activation, in the quantized network. Noise adds up
#   from layer to layer; a sudden fall is where to look.
# * **MACs** and **bytes** say what the layer costs, and so what a wider one would.

# %%
axes = q.report.plot()


# %%
def top1(q):
    """Percentage of all test images."""
    return qjax.top1(q.apply_fn, q.params, test.images, test.labels, preprocess=model.preprocess)


in_float = qjax.top1(
    model.apply_fn, model.params, test.images, test.labels, preprocess=model.preprocess
)
with_3_bits = top1(q)
print(f"{in_float:.2f} % in float, {with_3_bits:.2f} % at 3 bits")

# %% [markdown]
# ## One layer, step by step
#
# `qjax.explain` follows an image through one layer: what the codes are, what each step rounds
# away, and the bits of one accumulator.

# %%
stem = q.report[0].name
x = model.preprocess(test.images[:1])
print(qjax.explain(q, stem, x, model.params))

# %% [markdown]
# ## Values that leave their range
#
# `qjax.check` runs images and counts what was clipped. Some clipping is meant: the range of least
# error leaves out the rarest values.

# %%
print(qjax.check(q, model.preprocess(test.images[:64])))

# %% [markdown]
# ## What helps
#
# Two recipes, with what they cost. The first and the last layer are cheap: eight bits there add
# few bytes.

# %%
recipes = {
    "3 bits, first and last layer at 8": qjax.recipe(3, first_last_bits=8),
    "4 bits": qjax.recipe(4),
}
for name, recipe in recipes.items():
    chosen = qjax.quantize(model.apply_fn, model.params, calibration, recipe)
    size = sum(layer.bytes_quantized for layer in chosen.report)
    print(f"{name}: {top1(chosen):.2f} %, {size:,} bytes")

# %% [markdown]
# `qjax quantize --average-bits 3` chooses a width for every layer by what each one costs the
# logits, and `qjax quantize --report report.html` writes all of this as a page.
