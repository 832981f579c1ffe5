"""A process of `reliability.py` in which coverage leads the changes of a manifest, by Atheris.

Atheris instruments qjax while it is imported, and ends the process when it has done.
"""

import json
import random
import resource
import shutil
import sys
from pathlib import Path

import atheris

MOST_BYTES = 2**16
MEMORY_OF_CASES = 2**30
"""Bytes of addresses that cases may take beyond what importing and compiling took."""


def main(folder: str, count: int, seed: int) -> None:
    """Tries cases and writes what came of each.

    Args:
      folder: an empty folder, which gets the file `reliability_artifacts.CASES`.
      count: of cases.
      seed: of the changes.
    """
    with atheris.instrument_imports(include=["qjax"]):  # pyright: ignore
        import reliability_artifacts as artifacts

        import qjax
        from qjax import directory

    saved, target, again = (Path(folder, name) for name in ("saved", "target", "again"))
    qjax.save(saved, artifacts.mixed())
    text = json.dumps(directory.read(saved).entries)
    corpus = Path(folder, "corpus")
    corpus.mkdir()
    Path(corpus, "manifest").write_text(text)
    cases = Path(folder, artifacts.CASES).open("w", buffering=1)

    def try_manifest(data: bytes) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(saved, target)
        files = directory.read(target)
        try:
            artifacts.rewrite(files, data.decode(), files.data)
        except ValueError:  # no text of JSON
            files.manifest.write_bytes(data)
        print(json.dumps(artifacts.judged(target, again)), file=cases)

    def change(data: bytes, most_bytes: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            entries = json.loads(data)
        except (ValueError, RecursionError):
            entries = None
        if not (entries and isinstance(entries, dict | list)) or rng.random() < 0.1:
            return atheris.Mutate(data, most_bytes)
        artifacts.edit(entries, rng)
        return json.dumps(entries).encode()[:most_bytes]

    _limit_memory()
    options = [f"-runs={count}", f"-seed={seed + 1}", f"-max_len={MOST_BYTES}", "-len_control=0"]
    options += ["-rss_limit_mb=0", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], try_manifest, custom_mutator=change)
    atheris.Fuzz()


def _limit_memory() -> None:
    # libFuzzer's own limit is on the peak of the process, which starts at the peak of its parent
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + MEMORY_OF_CASES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
