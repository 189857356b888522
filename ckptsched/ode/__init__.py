"""Ordinary differential equations as chains of stages: tableaus, steps, blocks."""

from .adaptive.norms import batch_max_norm as batch_max_norm
from .adaptive.norms import rms_norm as rms_norm
from .adaptive.solve import AdaptiveSolution as AdaptiveSolution
from .adaptive.solve import solve_adaptive as solve_adaptive
from .adaptive.statistics import Statistics as Statistics
from .adaptive.step_size import StepControl as StepControl
from .block import ODEBlock as ODEBlock
from .methods.explicit import runge_kutta_step as runge_kutta_step
from .methods.table import BOSH3 as BOSH3
from .methods.table import DOPRI5 as DOPRI5
from .methods.table import DOPRI8 as DOPRI8
from .methods.table import EULER as EULER
from .methods.table import HEUN as HEUN
from .methods.table import HEUN3 as HEUN3
from .methods.table import METHODS as METHODS
from .methods.table import MIDPOINT as MIDPOINT
from .methods.table import RALSTON as RALSTON
from .methods.table import RK4 as RK4
from .methods.table import RK4_38 as RK4_38
from .methods.table import TSIT5 as TSIT5
from .methods.table import find_tableau as find_tableau
from .methods.tableau import ButcherTableau as ButcherTableau
from .odeint import odeint as odeint
