"""Ordinary differential equations as chains of stages: tableaus, steps, blocks."""

from .adaptive import AdaptiveSolution as AdaptiveSolution
from .adaptive import solve_adaptive as solve_adaptive
from .block import ODEBlock as ODEBlock
from .control import StepControl as StepControl
from .control import batch_max_norm as batch_max_norm
from .control import rms_norm as rms_norm
from .methods import BOSH3 as BOSH3
from .methods import DOPRI5 as DOPRI5
from .methods import DOPRI8 as DOPRI8
from .methods import EULER as EULER
from .methods import HEUN as HEUN
from .methods import HEUN3 as HEUN3
from .methods import METHODS as METHODS
from .methods import MIDPOINT as MIDPOINT
from .methods import RALSTON as RALSTON
from .methods import RK4 as RK4
from .methods import RK4_38 as RK4_38
from .methods import TSIT5 as TSIT5
from .methods import find_tableau as find_tableau
from .odeint import odeint as odeint
from .statistics import Statistics as Statistics
from .steps import runge_kutta_step as runge_kutta_step
from .tableaus import ButcherTableau as ButcherTableau
