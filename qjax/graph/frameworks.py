"""How a network of each framework becomes a function and a pytree of arrays: advice in errors."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from qjax.graph.naming import path_names


class Framework(NamedTuple):
    """A framework, known by the names of its classes: none is imported to look.

    Attributes:
      name: for messages.
      module: where its classes are defined, or a package around that.
      kinds: what a class is called in messages, by its name.
      lines: that quantize its `model` with `images`.
    """

    name: str
    module: str
    kinds: Mapping[str, str]
    lines: str


FRAMEWORKS = (
    Framework(
        "Flax Linen",
        "flax.linen",
        {"Module": "module"},
        "q = qjax.quantize(model.apply, variables, images)",
    ),
    Framework(
        "Flax NNX",
        "flax.nnx",
        {"Module": "module", "GraphDef": "graphdef"},
        """\
graphdef, state = nnx.split(model)
def apply_fn(state, x):
    return nnx.merge(graphdef, state)(x)
q = qjax.quantize(apply_fn, state, images)""",
    ),
    Framework(
        "Equinox",
        "equinox",
        {"Module": "module"},
        """\
params, static = eqx.partition(model, eqx.is_array)
def apply_fn(params, x):
    return jax.vmap(eqx.combine(params, static))(x)
q = qjax.quantize(apply_fn, params, images)""",
    ),
    Framework(
        "Haiku",
        "haiku",
        {"Module": "module", "Transformed": "pair of functions"},
        """\
network = hk.without_apply_rng(hk.transform(forward))
q = qjax.quantize(network.apply, params, images)""",
    ),
    Framework(
        "Haiku",
        "haiku",
        {"TransformedWithState": "pair of functions"},
        """\
network = hk.without_apply_rng(hk.transform_with_state(forward))
def apply_fn(variables, x):
    return network.apply(variables["params"], variables["state"], x)[0]
q = qjax.quantize(apply_fn, {"params": params, "state": state}, images)""",
    ),
    Framework(
        "Keras",
        "keras",
        {"Layer": "model", "Variable": "variable"},
        """\
params = {v.path: v.value for v in model.variables}
def apply_fn(params, x):
    trained = [params[v.path] for v in model.trainable_variables]
    others = [params[v.path] for v in model.non_trainable_variables]
    return model.stateless_call(trained, others, x)[0]
q = qjax.quantize(apply_fn, params, images)""",
    ),
)


def check_network(apply_fn: Any, params: Any) -> None:
    """Refuses what is no function and no pytree of arrays.

    Raises:
      TypeError: with the lines to write, for an object of a known framework.

    Examples:
      >>> check_network(lambda params, x: x * params["scale"], {"scale": 2.0})
      Traceback (most recent call last):
      TypeError: `params` must hold arrays; found float at 'scale'. Make it one (jnp.asarray), or
      close over it in `apply_fn`.
    """
    if not callable(apply_fn):
        raise TypeError(
            "`apply_fn` must be a function of (params, x), and comes before `params`; got "
            f"{_described(apply_fn)}"
        )
    leaves = jax.tree.leaves(params)
    for path, leaf in zip(path_names(params), leaves, strict=True):
        if _found(leaf) or not hasattr(leaf, "dtype"):
            nodes = jax.tree.leaves(params, is_leaf=lambda node: _found(node) is not None)
            owner = next((node for node in nodes if _found(node)), None)
            remedy = (
                "Make it one (jnp.asarray), or close over it in `apply_fn`."
                if owner is None
                else f"It belongs to {_described(owner)}"
            )
            raise TypeError(
                f"`params` must hold arrays; found {type(leaf).__name__} at {path!r}. {remedy}"
            )
    if not leaves and _found(params):
        raise TypeError(f"`params` must hold arrays; got {_described(params)}")


@contextlib.contextmanager
def advising(apply_fn: Any) -> Iterator[None]:
    """Says how to make a function of an object of a known framework that fails as one.

    Raises:
      TypeError: it was called within this context and raised an error.
    """
    try:
        yield
    except Exception as error:  # whatever the framework raises
        if _found(inspect.unwrap(apply_fn)) is None:
            raise
        raise TypeError(
            f"`apply_fn` must be a function of (params, x); got {_described(apply_fn)}"
        ) from error


def _class_of(value: Any) -> type:
    return value if isinstance(value, type) else type(value)


def _found(value: Any) -> tuple[Framework, str] | None:
    """The framework that a value or a class belongs to, and what it is there."""
    for cls in _class_of(value).__mro__:
        for framework in FRAMEWORKS:
            is_own = f"{cls.__module__}.".startswith(f"{framework.module}.")
            if is_own and cls.__name__ in framework.kinds:
                return framework, framework.kinds[cls.__name__]
    return None


def _described(value: Any) -> str:
    """What a value is, with the lines to write where it belongs to a framework."""
    found, name = _found(value), _class_of(value).__name__
    if found is None:
        return f"{name}."
    framework, kind = found
    return f"{name}, a {kind} of {framework.name}. Write:\n\n{framework.lines}\n"
