"""NF4, the 4-bit NormalFloat of QLoRA: sixteen published levels times a scale."""

import dataclasses
from typing import ClassVar

import numpy as np

from qjax.formats.base import Spec
from qjax.formats.codebook import Codebook, fixed_codebook
from qjax.pytree import pytree

# Dettmers et al., 2023, arXiv:2305.14314, appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@pytree
@dataclasses.dataclass(frozen=True)
class NF4(Codebook):
    """The codebook of NormalFloat at 4 bits.

    Attributes:
      scale: float32, positive; of the rank of the data.
      levels: float32[16], the published ones.

    Examples:
      >>> import jax.numpy as jnp
      >>> nf4 = NF4(jnp.float32(2.0), jnp.asarray(LEVELS))
      >>> nf4.bits, nf4.encode(jnp.array([-9.0, 0.0, 0.5])).tolist()
      (4, [0, 7, 10])
      >>> print(nf4.project(jnp.array([-9.0, 0.0, 0.5])))
      [-2.         0.         0.4922246]

    References:
      Dettmers et al., 2023, arXiv:2305.14314, appendix E.
    """

    name: ClassVar[str] = "nf4"


def _levels(spec: Spec) -> np.ndarray:
    del spec
    return np.asarray(LEVELS, np.float32)


NORMAL_FLOAT = fixed_codebook(NF4, _levels, widths=range(4, 5))
