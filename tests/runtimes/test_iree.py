"""The integer network in IREE: the codes and logits of JAX, bit for bit."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import export

import qjax

pytestmark = pytest.mark.runtimes

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "stablehlo.md"


def compiled(exported: export.Exported) -> Any:
    import iree.compiler
    import iree.runtime

    module = iree.compiler.compile_str(
        exported.mlir_module_serialized, input_type="stablehlo", target_backends=["llvm-cpu"]
    )
    return iree.runtime.load_vm_flatbuffer(module, driver="local-task").main


def test_codes_and_logits_are_those_of_jax():
    q, x = small.quantized(), small.images(5)
    run = qjax.integer(q)

    def outputs(params: Any, x: Any) -> Any:
        return run(params, x), run.codes(params, x)

    exported = export.export(jax.jit(outputs))(q.params, x)
    leaves = [*jax.tree.leaves(q.params), x]
    found = compiled(exported)(*(np.asarray(leaves[i]) for i in exported.module_kept_var_idx))
    for array, expected in zip(found, jax.tree.leaves(outputs(q.params, x)), strict=True):
        np.testing.assert_array_equal(array.to_host(), expected)


def test_a_batch_of_any_size_needs_a_lowering_without_reshapes():
    q = small.quantized()
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 6, 6, 2"), jnp.float32)

    def of(**options: Any) -> export.Exported:
        run = qjax.integer(q, **options)
        return export.export(jax.jit(lambda x: run(q.params, x)))(shape)

    main = compiled(of(lowering="int8"))
    for count in (3, 5):
        x = small.images(count)
        np.testing.assert_array_equal(main(x).to_host(), qjax.integer(q)(q.params, x))
    with pytest.raises(Exception, match="reshape"):
        compiled(of(lowering="dot"))


def test_the_example_of_the_page_runs():
    [code] = re.findall(r"```python\n(import iree.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    q, images = small.quantized(), jnp.asarray(small.images(5))
    names: dict[str, Any] = {"jax": jax, "np": np, "export": export, "q": q, "images": images}
    names["run"] = qjax.integer(q)
    exec(code, names)
    np.testing.assert_array_equal(names["logits"], names["run"](q.params, images))
