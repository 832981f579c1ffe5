"""How functions are compiled: to run a few times, or to run fast."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
from jax.core import Tracer

F = TypeVar("F", bound=Callable[..., Any])
Options = tuple[tuple[str, Any], ...]
Calling = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


def _call(jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return jitted(*args, **kwargs)


_calling: ContextVar[Calling] = ContextVar("calling", default=_call)


@contextlib.contextmanager
def calling(how: Calling = _call) -> Iterator[None]:
    """Within, compiled functions are called in a way of its own; see `qjax.threads`.

    Args:
      how: of (function, positional arguments, keyword arguments); by default a plain call.
    """
    token = _calling.set(how)
    try:
        yield
    finally:
        _calling.reset(token)


def not_set(options: Mapping[str, Any], flags: str) -> dict[str, Any]:
    """Leaves out the options that XLA's flags name: users know better.

    Args:
      options: of the compiler.
      flags: in the form of the environment variable XLA_FLAGS.

    Examples:
      >>> not_set({"xla_a": 1, "xla_b": True}, "--xla_a=2")
      {'xla_b': True}
    """
    named = {flag.removeprefix("--").partition("=")[0] for flag in flags.split()}
    return {option: value for option, value in options.items() if option not in named}


# What fits a network runs a few times: the time to compile it counts most. On a CPU XLA's older
# emitters of loops take half the time to compile, and level 2 takes 0.7 to 0.9 of level 3, for
# code about as fast; code cut into more parts than there are cores takes longer.
FAST_TO_COMPILE: dict[str, Any] = not_set(
    {
        "xla_backend_optimization_level": 2,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": os.cpu_count() or 1,
    },
    os.environ.get("XLA_FLAGS", ""),
)

_PROBING = threading.Lock()

# What users call again and again is compiled as they set up XLA.
FAST_TO_RUN: dict[str, Any] = {}


def known(options: Options) -> Options:
    """Those of the options that this device's compiler knows."""
    with _PROBING:  # each is tried once, by whichever thread needs it first
        return tuple(option for option in options if _is_known(*option))


@functools.cache
def _is_known(option: str, value: Any) -> bool:
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except Exception:  # an option of another XLA: each version has its own error
        return False
    return True


def compiled(function: F, options: Mapping[str, Any], **static: Any) -> F:
    """`jax.jit` with options of the compiler; within another program it becomes a part of that.

    Args:
      function: the function.
      options: of the compiler, read whenever it is called.
      static: `static_argnums` and `static_argnames` of `jax.jit`.
    """

    @functools.cache
    def jitted(options: Options) -> Callable[..., Any]:
        return jax.jit(function, compiler_options=dict(options) or None, **static)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = tuple(options.items())
        if found and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return function(*args, **kwargs)  # options are those of the program around it
        return _calling.get()(jitted(known(found)), args, kwargs)

    return call  # pyright: ignore


def program(
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
) -> Callable[[F], F]:
    """Compiles a function of a module to run a few times; the arguments are those of `jax.jit`."""
    static = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    return lambda function: compiled(function, FAST_TO_COMPILE, **static)
