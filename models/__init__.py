"""Networks for the examples, the tests and the benchmarks."""

from .mlp import deep_mlp as deep_mlp
from .mlp import ode_mlp as ode_mlp
from .resnet import ode_resnet18 as ode_resnet18
from .resnet import ode_resnet_small as ode_resnet_small
from .squeezenext import ode_squeezenext23 as ode_squeezenext23
