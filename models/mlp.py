"""Small fully connected networks: chains that are quick to run and easy to count."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ckptsched.ode import ODEBlock


def ode_mlp(width: int = 16, method: str = "rk4", steps: int = 100) -> nn.Sequential:
    """An ODE block between two linear layers.

    Args:
        width: Features of the input, of the state and of the output.
        method: Integrator, as `ODEBlock` takes it.
        steps: Time steps of the block.

    Returns:
        A chain of steps + 2 stages for inputs of shape (batch, width).
    """
    f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    return nn.Sequential(
        OrderedDict(
            entry=nn.Linear(width, width),
            ode=ODEBlock(f, method=method, steps=steps),
            exit=nn.Linear(width, width),
        )
    )


def deep_mlp(width: int = 16, depth: int = 8) -> nn.Sequential:
    """Linear layers with a tanh after each.

    Args:
        width: Features of the input, of every layer and of the output.
        depth: Number of layers.

    Returns:
        A chain of `depth` blocks of 2 stages for inputs of shape (batch, width).
    """
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))
