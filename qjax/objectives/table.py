"""The table of range objectives, by the name that a recipe gives them."""

from qjax.objectives.base import Objective
from qjax.objectives.divergence import KL
from qjax.objectives.errors import ABSMAX, MSE, OUTPUT_MSE, PERCENTILE

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (ABSMAX, PERCENTILE, MSE, OUTPUT_MSE, KL)
}
