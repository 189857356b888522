"""Ordinary differential equations as chains of stages: tableaus, steps, blocks."""

from .block import ODEBlock as ODEBlock
from .steps import runge_kutta_step as runge_kutta_step
from .tableaus import EULER as EULER
from .tableaus import HEUN as HEUN
from .tableaus import METHODS as METHODS
from .tableaus import MIDPOINT as MIDPOINT
from .tableaus import RK4 as RK4
from .tableaus import ButcherTableau as ButcherTableau
from .tableaus import find_tableau as find_tableau
