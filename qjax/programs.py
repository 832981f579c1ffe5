"""Jitted functions that are compiled to run a few times: the time to compile them counts most."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.core import Tracer

F = TypeVar("F", bound=Callable[..., Any])

# On a CPU XLA's older emitters of loops take half the time to compile, for code as fast, and code
# cut into more parts than there are cores takes longer.
FAST_TO_COMPILE = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": os.cpu_count() or 1,
}


Options = tuple[tuple[str, Any], ...]


@functools.cache
def _known(options: Options) -> Options:
    """The options, if they are ones that this device's compiler knows; else none."""
    if jax.default_backend() != "cpu":
        return ()
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(0.0).compile()
    except Exception:  # an option of another XLA: each version has its own error
        return ()
    return options


def program(
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
) -> Callable[[F], F]:
    """`jax.jit` for a function of a module; within another program it becomes a part of that.

    Args:
      static_argnums: as of `jax.jit`.
      static_argnames: as of `jax.jit`.
    """

    def decorate(function: F) -> F:
        @functools.cache
        def jitted(options: Options) -> Callable[..., Any]:
            static = {"static_argnums": static_argnums, "static_argnames": static_argnames}
            return jax.jit(function, compiler_options=dict(options), **static)  # pyright: ignore

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
                return function(*args, **kwargs)
            return jitted(_known(tuple(FAST_TO_COMPILE.items())))(*args, **kwargs)

        return call  # pyright: ignore

    return decorate
