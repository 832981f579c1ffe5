"""A hash of what a network computes: the same in every process, another for another function."""

import dataclasses
import enum
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from qjax.graph import jaxpr
from qjax.graph.jaxpr import Atom, FlatJaxpr
from qjax.graph.naming import path_names

# Equations that do nothing where shape and type stay.
_IDENTITIES = frozenset({*jaxpr.MOVEMENT, "sharding_constraint"} - {"transpose"})
# Parameters of equations that say where or for whom, not what; the types of results are known.
_IGNORED = frozenset(
    {"name", "sharding", "out_sharding", "layout", "debug_info", "preferred_element_type"}
)

Env = dict[core.Var, str]


def fingerprint(flat: FlatJaxpr) -> str:
    """Hashes the equations that lead to the outputs: primitives, shapes, numbers and constants.

    Calls are replaced by their bodies, so that `jax.jit` and differentiation rules do not count;
    nor do names, places, dead code and the order of what is independent. Types of 64 bits count as
    those of 32, so that `jax_enable_x64` does not matter.

    Args:
      flat: the network.

    Returns:
      64 hexadecimal digits.

    Examples:
      >>> import jax.numpy as jnp
      >>> from qjax.graph.flatten import flatten
      >>> def of(function):
      ...     return fingerprint(flatten(function, jnp.ones(3), jnp.ones(3)))
      >>> of(lambda w, x: jax.nn.relu(w * x)) == of(jax.jit(lambda w, x: jnp.maximum(w * x, 0)))
      True
      >>> of(lambda w, x: jax.nn.relu(w * x)) == of(lambda w, x: jax.nn.relu6(w * x))
      False
    """
    env = {var: _hash("param", str(i), _type(var)) for i, var in enumerate(flat.params)}
    env |= {var: _hash("input", str(i), _type(var)) for i, var in enumerate(flat.inputs)}
    env |= {var: _array(value) for var, value in flat.constants.items()}
    _walk(flat.equations, env)
    return _hash(*(_atom(atom, env) for atom in flat.outputs))


def digest(tree: Any) -> str:
    """The SHA-256 of the arrays of a pytree and of their paths."""
    found = hashlib.sha256()
    for name, leaf in zip(path_names(tree), jax.tree.leaves(tree), strict=True):
        array = np.asarray(leaf)
        found.update(f"{name} {array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _walk(equations: Sequence[core.JaxprEqn], env: Env) -> None:
    """Writes the hash of every result: of the equation and of the hashes of its operands."""
    for equation in equations:
        operands = [_atom(atom, env) for atom in equation.invars]
        inner = jaxpr.body(equation)
        if inner is not None:
            results = _results(inner, operands)
        elif _is_identity(equation):
            results = operands
        else:
            given = sorted(_params(equation).items())
            described = [f"{key}={_text(value)}" for key, value in given if _counts(key, value)]
            what = _hash(equation.primitive.name, *operands, *described)
            results = [_hash(what, str(i), _type(var)) for i, var in enumerate(equation.outvars)]
        env.update(zip(equation.outvars, results, strict=True))


def _params(equation: core.JaxprEqn) -> dict[str, Any]:
    """The parameters of an equation, under the names that they had in JAX 0.10."""
    if "ft_in" not in equation.params:
        return equation.params
    constant, carried = jaxpr.scan_operands(equation)
    rest = {name: value for name, value in equation.params.items() if name[:3] != "ft_"}
    return rest | {"num_consts": constant, "num_carry": carried}


def _results(closed: core.ClosedJaxpr, operands: Sequence[str]) -> list[str]:
    """The hashes of what a function returns."""
    inner = closed.jaxpr
    env = dict(zip(inner.constvars, map(_array, closed.consts), strict=True))
    env |= dict(zip(inner.invars, operands, strict=True))
    _walk(inner.eqns, env)
    return [_atom(atom, env) for atom in inner.outvars]


def _is_identity(equation: core.JaxprEqn) -> bool:
    if equation.primitive.name not in _IDENTITIES or len(equation.invars) != 1:
        return False
    return _type(equation.invars[0]) == _type(equation.outvars[0])


def _atom(atom: Atom, env: Env) -> str:
    return _array(atom.val) if jaxpr.is_literal(atom) else env[atom]


def _counts(name: str, value: Any) -> bool:
    """Whether a parameter is written down: what is new in another JAX is None or False there."""
    is_rule = name.endswith(("_thunk", "_fun")) or callable(value) and not isinstance(value, type)
    return not (name in _IGNORED or is_rule or value is None or value is False)


def _text(value: Any) -> str:
    """A parameter as a text without addresses."""
    if isinstance(value := jaxpr.closed(value), core.ClosedJaxpr):
        operands = [f"operand {i} {_type(var)}" for i, var in enumerate(value.jaxpr.invars)]
        return _hash(*_results(value, operands))
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return repr(value)
    if isinstance(value, np.dtype | type):
        return _dtype(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value)
    if isinstance(value, tuple | list):
        return f"({','.join(map(_text, value))})"
    if isinstance(value, dict):
        return _text(sorted(value.items()))
    if dataclasses.is_dataclass(value):
        return _text([getattr(value, field.name) for field in dataclasses.fields(value)])
    return type(value).__name__


def _array(value: Any) -> str:
    """An array by its values."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    narrow = array.astype(_dtype(array.dtype)) if array.dtype.kind in "biuf" else array
    return _hash("array", _dtype(array.dtype), str(array.shape), narrow.tobytes().hex())


def _type(atom: Atom) -> str:
    return f"{_dtype(jaxpr.dtype(atom))}{list(jaxpr.shape(atom))}"


def _dtype(value: Any) -> str:
    """The name of a type, that of 32 bits for one of 64."""
    try:
        return np.dtype(value).name.replace("64", "32")
    except TypeError:  # of keys of random numbers
        return str(value)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
