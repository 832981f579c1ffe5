"""Counts what two calls of `qjax.quantize` compile, for whatever checkout is imported.

python scripts/count_programs.py resnet20-digits 8
"""

import json
import sys
import time
from collections.abc import Iterable

import jax

import pretrained
import qjax
from pretrained import datasets

CALIBRATION_SIZE = 1024  # as many as the command line draws
COMPILATION = "/jax/core/compile/backend_compile_duration"  # once per program
PREPARATION = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    COMPILATION,
)
CALLS = ("first", "second")


def main(model_name: str, bits: str) -> None:
    """Prints, as JSON by call: wall and CPU seconds, no peak, programs, seconds of compiling."""
    model = pretrained.load(model_name)
    images = datasets.load(model.dataset, "train").images
    drawn = datasets.calibration_draw(images, min(CALIBRATION_SIZE, len(images)), 0)
    images = model.preprocess(drawn)
    spans: list[tuple[str, float, float]] = []
    jax.monitoring.register_event_time_span_listener(
        lambda event, start_time, end_time, **_: spans.append((event, start_time, end_time))
    )
    found = {}
    for name in CALLS:
        spans.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        q = qjax.quantize(model.apply_fn, model.params, images, bits=int(bits))
        jax.block_until_ready(q.params)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        programs = sum(event == COMPILATION for event, _, _ in spans)
        busy = covered((start, end) for event, start, end in spans if event in PREPARATION)
        found[name] = (wall, cpu, None, programs, busy)
    print(json.dumps(found))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of a union of spans: functions are traced while others are."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
