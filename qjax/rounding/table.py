"""The table of roundings, by the name that a recipe gives them."""

from qjax.rounding.base import Rounding
from qjax.rounding.gptq import GPTQ
from qjax.rounding.nearest import NEAREST

ROUNDINGS: dict[str, Rounding] = {rounding.name: rounding for rounding in (NEAREST, GPTQ)}
