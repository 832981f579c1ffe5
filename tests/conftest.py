"""Strict JAX for every test: no silent dtype or rank promotion; four CPU devices for sharding.

The report page is checked in a headless Chromium with `--browser`. No package index has one, so
without the option that check is left out, and the end of the run says so; with it, it fails where
there is no Chromium.
"""

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)

# The first example of a property compiles and the others do not, so no example has a deadline.
# The same examples every run: what fails here fails everywhere.
hypothesis.settings.register_profile("qjax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("qjax")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--browser`."""
    parser.addoption("--browser", action="store_true", help="check the report page in Chromium")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the checks that need a browser, unless they were asked for."""
    if config.getoption("--browser"):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Says what was not run."""
    if not config.getoption("--browser"):
        terminalreporter.write_line(
            "not run: the checks of the report page in a browser; "
            "with Chromium installed, python -m pytest --browser runs them"
        )


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """Four CPU devices along one axis, `data`."""
    return jax.make_mesh((4,), ("data",), devices=jax.devices("cpu"))
