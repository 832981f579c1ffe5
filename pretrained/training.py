"""Training the reference models: SGD with Nesterov momentum in plain JAX, resumable.

The weights that come out are the exponential moving average at the last step, with batch statistics
measured again for them. No checkpoint is ever chosen by its accuracy. Steps run in chunks, each one
call of a jitted `lax.scan`, after which the whole state goes to disk.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from pretrained import augmentation, checkpoint, fast_resnet
from pretrained.checkpoint import Entry, History, State
from pretrained.datasets import Dataset
from pretrained.fast_convolution import conv_general_dilated
from pretrained.models import LeNet5
from pretrained.preprocessing import Preprocessing
from pretrained.recipes import Recipe
from pretrained.resnet import BATCH_NORM_MOMENTUM, ResNet

CHUNK = 50
STATISTICS_BATCHES = 40


class Progress(NamedTuple):
    """Where training stands: steps done and in all, mean loss of the last steps, seconds so far."""

    step: int
    steps: int
    loss: float
    seconds: float


class Trainee(Protocol):
    """What is trained: hashable, so that its steps are compiled once.

    Attributes:
      scans: whether a chunk of steps is one program; else every step is one.
    """

    scans: ClassVar[bool]

    def start(self, image_shape: tuple[int, ...]) -> State:
        """Returns the state before the first step, for images of shape (H, W, C)."""
        ...

    def forward(
        self, params: Any, batch_stats: Any, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The forward pass in training mode: (logits float[N, K], the updated `batch_stats`)."""
        ...

    def loss(self, logits: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
        """What is minimized, float[], at the preprocessed images x."""
        ...

    def constrain(self, params: Any) -> Any:
        """Brings params back to where they must be, after an update."""
        ...

    def finish(self, state: State, images: jax.Array) -> Any:
        """The variables at the end, from the training images uint8[N, H, W, C]."""
        ...

    def predict(self, variables: Any, images: jax.Array) -> jax.Array:
        """The most likely class of every image uint8[N, H, W, C]."""
        ...


class Trained(NamedTuple):
    """The result: variables as Flax takes them, the log, seconds of training over all sessions."""

    variables: Any
    log: tuple[Entry, ...]
    seconds: float


def train(
    recipe: Recipe,
    data: Dataset,
    held_out: Dataset,
    state_file: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_entry: Callable[[Entry], None] = lambda _: None,
    trainee: Trainee | None = None,
) -> Trained:
    """Trains a recipe to its end, from its start or from where `state_file` left off.

    Args:
      recipe: what to train.
      data: the training split.
      held_out: the split whose accuracy is logged and steers nothing.
      state_file: where the state is kept, replaced after every chunk of steps.
      on_progress: called after every chunk.
      on_entry: called with every new line of the log.
      trainee: what is trained; by default the recipe's model, from scratch.

    Returns:
      The trained variables and how it went.

    Raises:
      ValueError: if `state_file` belongs to another recipe or another version of it.
    """
    chosen: Trainee = FromScratch(recipe) if trainee is None else trainee
    epoch_steps = len(data.images) / recipe.batch_size
    chunks = max(1, round(recipe.epochs * epoch_steps / CHUNK))
    images = jnp.asarray(data.images)
    key = jax.random.key(recipe.seed)
    mirrored = jax.random.bernoulli(key, shape=images.shape[:1]) if recipe.flip else None
    examples = Examples(images, jnp.asarray(data.labels), mirrored)
    if state_file.exists():
        state, history = checkpoint.read(state_file, recipe)
    else:
        state, history = chosen.start(data.images.shape[1:]), History()
    variables = None
    for chunk in range(int(state.step) // CHUNK, chunks):
        start = time.perf_counter() - history.seconds
        rows, epochs = _order(recipe, len(images), chunk)
        size = next((s for until, s in recipe.sizes if chunk < until * chunks), images.shape[1])
        run = _run_chunk if chosen.scans else _run_steps
        schedule = Schedule(recipe, chunks * CHUNK, size)
        state, losses = run(chosen, schedule, examples, state, (rows, epochs))
        history = History(
            history.log, (*history.losses, float(losses.mean())), time.perf_counter() - start
        )
        done = (chunk + 1) * CHUNK
        on_progress(Progress(done, chunks * CHUNK, history.losses[-1], history.seconds))
        period = recipe.evaluate_every * epoch_steps
        if chunk + 1 == chunks or done // period > chunk * CHUNK // period:
            variables = chosen.finish(state, images)
            accuracy = evaluate(chosen, variables, held_out)
            seconds = time.perf_counter() - start
            entry = Entry(
                round(done / epoch_steps, 2), float(np.mean(history.losses)), accuracy, seconds
            )
            history = History((*history.log, entry), (), seconds)
            on_entry(entry)
        checkpoint.write(state_file, recipe, state, history)
    if variables is None:
        variables = chosen.finish(state, images)
    return Trained(variables, history.log, history.seconds)


def evaluate(trainee: Trainee, variables: Any, data: Dataset, batch_size: int = 500) -> float:
    """Returns the percentage of the images of `data` that are classified correctly."""
    hits = 0
    for i in range(0, len(data.images), batch_size):
        images, labels = data.images[i : i + batch_size], data.labels[i : i + batch_size]
        hits += int((trainee.predict(variables, jnp.asarray(images)) == labels).sum())
    return 100 * hits / len(data.images)


@partial(jax.jit, static_argnums=(0, 1))
def predict(
    apply_fn: Callable[..., Any], preprocess: Preprocessing, variables: Any, images: jax.Array
) -> jax.Array:
    """The most likely class of every image uint8[N, H, W, C]."""
    return apply_fn(variables, preprocess(images)).argmax(axis=-1)


@dataclasses.dataclass(frozen=True)
class FromScratch:
    """The model of a recipe, trained from random weights: a `Trainee`."""

    recipe: Recipe

    scans: ClassVar[bool] = True

    def start(self, image_shape: tuple[int, ...]) -> State:
        """See `Trainee`."""
        variables = self.recipe.model.init(
            jax.random.key(self.recipe.seed), jnp.zeros((1, *image_shape))
        )
        return initial_state(variables["params"], variables.get("batch_stats", {}))

    def forward(
        self, params: Any, batch_stats: Any, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """See `Trainee`."""
        del key
        variables = {"params": params, "batch_stats": batch_stats}
        return training_pass(self.recipe.model, variables, x)

    def loss(self, logits: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
        """See `Trainee`."""
        del x
        return cross_entropy(logits, labels, self.recipe.label_smoothing)

    def constrain(self, params: Any) -> Any:
        """See `Trainee`."""
        return params

    def finish(self, state: State, images: jax.Array) -> Any:
        """See `Trainee`."""
        return _final_variables(self.recipe, state, images)

    def predict(self, variables: Any, images: jax.Array) -> jax.Array:
        """See `Trainee`."""
        return predict(self.recipe.model.apply, self.recipe.preprocessing, variables, images)


def initial_state(params: Any, batch_stats: Any) -> State:
    """Returns the state before the first step."""
    return State(
        params=params,
        velocity=jax.tree.map(jnp.zeros_like, params),
        average=jax.tree.map(jnp.copy, params),
        batch_stats=batch_stats,
        step=jnp.zeros((), jnp.int32),
    )


def learning_rate(recipe: Recipe, steps: int, step: jax.Array) -> jax.Array:
    """A linear rise to the peak, some time there, then half a cosine down to 0.

    Args:
      recipe: gives the peak and the fractions that rise and stay.
      steps: in all.
      step: int32[], steps done.

    Returns:
      float32[].
    """
    done = (step + 1) / steps
    rise = done / max(recipe.warmup, 1 / steps)
    end = recipe.warmup + recipe.steady
    fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.maximum(done - end, 0) / (1 - end)))
    return recipe.learning_rate * jnp.where(done < recipe.warmup, rise, fall)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Mean of -sum_k t_k log softmax(z)_k with t = (1 - smoothing) onehot + smoothing / K.

    Args:
      logits: float[N, K].
      labels: int32[N].
      smoothing: 0 to 1.

    Returns:
      float[].
    """
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, labels[:, None], axis=1)
    return -((1 - smoothing) * picked.mean() + smoothing * log_p.mean())


class Schedule(NamedTuple):
    """What a step depends on: the recipe, the steps in all, the side that images are shrunk to."""

    recipe: Recipe
    steps: int
    size: int


class Examples(NamedTuple):
    """The training split on the device.

    Attributes:
      images: uint8[N, H, W, C].
      labels: int32[N].
      mirrored: bool[N], those that are mirrored in the first epoch; None if none ever are.
    """

    images: jax.Array
    labels: jax.Array
    mirrored: jax.Array | None


Batch = tuple[Any, Any]  # rows int32[B] of the examples, and the epochs that they belong to


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _run_chunk(
    trainee: Trainee, schedule: Schedule, examples: Examples, state: State, batches: Batch
) -> tuple[State, jax.Array]:
    """Runs a step for every one of `batches` [CHUNK, B]; also returns losses float[CHUNK]."""
    return lax.scan(partial(_step, trainee, schedule, examples), state, batches)


def _run_steps(
    trainee: Trainee, schedule: Schedule, examples: Examples, state: State, batches: Batch
) -> tuple[State, jax.Array]:
    """Does what `_run_chunk` does, by a program for a step.

    XLA differentiates convolutions far more slowly inside of a `lax.scan` on a CPU.
    """
    losses = []
    for batch in zip(*batches, strict=True):
        state, loss = _run_step(trainee, schedule, examples, state, batch)
        losses.append(loss)
    return state, jnp.stack(losses)


def _step(
    trainee: Trainee, schedule: Schedule, examples: Examples, state: State, batch: Batch
) -> tuple[State, jax.Array]:
    recipe, steps, size = schedule
    rows, epochs = batch
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    x = augmentation.shift(key, examples.images[rows], recipe.shift)
    if examples.mirrored is not None:
        x = augmentation.mirror(x, examples.mirrored[rows] ^ (epochs % 2 == 1))
    x = recipe.preprocessing(x)
    x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "linear")

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        draw = jax.random.fold_in(key, 1)
        logits, batch_stats = trainee.forward(params, state.batch_stats, x, draw)
        return trainee.loss(logits, x, examples.labels[rows]), batch_stats

    (loss, batch_stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    rate = learning_rate(recipe, steps, state.step)
    decay = jnp.minimum(recipe.average_decay, (1 + state.step) / (10 + state.step))

    def update(path, p, g, v):
        g = g + (recipe.weight_decay * p if path[-1].key == "kernel" else 0)
        v = recipe.momentum * v + g
        return p - rate * (g + recipe.momentum * v), v

    updated = jax.tree_util.tree_map_with_path(update, state.params, gradient, state.velocity)
    params, velocity = jax.tree.transpose(
        jax.tree.structure(state.params), jax.tree.structure((0, 0)), updated
    )
    params = trainee.constrain(params)
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    return State(
        params=params,
        velocity=velocity,
        average=average,
        batch_stats=batch_stats,
        step=state.step + 1,
    ), loss


_run_step = partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)(_step)


def training_pass(model: nn.Module, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """The forward pass in training mode, on a CPU by way of `fast_convolution`.

    Args:
      model: the module.
      variables: `params` and, with batch norm, `batch_stats`.
      x: preprocessed images float[N, H, W, C].

    Returns:
      Logits float[N, K] and the updated `batch_stats`, {} in a model without.
    """
    if jax.default_backend() == "cpu":
        if isinstance(model, ResNet) and fast_resnet.supports(model):
            return fast_resnet.apply(model, variables, x)
        if isinstance(model, LeNet5):
            model = model.copy(conv_general_dilated=conv_general_dilated)
    logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return logits, new.get("batch_stats", {})


def _order(recipe: Recipe, n: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of one chunk, int32[CHUNK, B], and the epochs they belong to, of the same shape.

    Epochs follow each other without a gap, each in an order of its own: no image is left out.
    """
    length = CHUNK * recipe.batch_size
    positions = np.arange(chunk * length, (chunk + 1) * length)
    epochs = positions // n
    rows = np.concatenate(
        [
            np.random.default_rng((recipe.seed, epoch)).permutation(n)[
                positions[epochs == epoch] % n
            ]
            for epoch in np.unique(epochs)
        ]
    )
    shape = (CHUNK, recipe.batch_size)
    return rows.reshape(shape).astype(np.int32), epochs.reshape(shape).astype(np.int32)


def _final_variables(recipe: Recipe, state: State, images: jax.Array) -> Any:
    """The averaged weights, with batch statistics measured for them on training images."""
    if not state.batch_stats:
        return {"params": state.average}
    batch = min(250, len(images))
    rows = np.random.default_rng(recipe.seed).permutation(len(images))
    rows = rows[: batch * min(STATISTICS_BATCHES, len(images) // batch)].reshape(-1, batch)
    batch_stats = _measure_statistics(
        recipe, state.average, state.batch_stats, images, jnp.asarray(rows, jnp.int32)
    )
    return {"params": state.average, "batch_stats": batch_stats}


@partial(jax.jit, static_argnums=0)
def _measure_statistics(
    recipe: Recipe, params: Any, like: Any, images: jax.Array, rows: jax.Array
) -> Any:
    """The mean of the batch statistics over batches of `images`, one for each row of `rows`."""
    zeros = jax.tree.map(jnp.zeros_like, like)

    def add_batch(total, rows):
        # From zero, the running statistics after one batch are (1 - momentum) times the batch's.
        variables = {"params": params, "batch_stats": zeros}
        _, new = training_pass(recipe.model, variables, recipe.preprocessing(images[rows]))
        return jax.tree.map(jnp.add, total, new), None

    total, _ = lax.scan(add_batch, zeros, rows)
    return jax.tree.map(lambda t: t / (len(rows) * (1 - BATCH_NORM_MOMENTUM)), total)
