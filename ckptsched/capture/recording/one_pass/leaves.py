"""Which modules are one call each, and which are opened."""

from __future__ import annotations

import torch
from torch import nn

from ....recompute.fsdp import HOOKS, own_hooks
from ...wrappers import StandsFor, in_place, is_compiled

# Modules of torch.nn that others write their models with: they are opened. All others are calls.
_OPENED = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    *(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
_QUIET = "transformers.utils.output_capturing"


def is_one_call(module: nn.Module, *, is_model: bool) -> bool:
    """Whether a module is called whole, whatever its forward does.

    Args:
        module: The module.
        is_model: Whether it is the model that is recorded.
    """
    if isinstance(module, (torch.jit.ScriptModule, StandsFor)):
        return True
    if not is_model and in_place(module) is not None:
        return True  # it follows plans of its own
    if not is_model and (_has_loud_hooks(module) or is_compiled(module)):
        return True
    of_torch = type(module).__module__.startswith("torch.nn.modules")
    return hasattr(module, "parametrizations") or (of_torch and not isinstance(module, _OPENED))


def _has_loud_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may do more than a recording sees.

    Those of transformers hand on what it is asked for, while its forward runs.
    """
    hooks = [hook for kind in HOOKS for hook in own_hooks(module, kind).values()]
    return not all(getattr(hook, "__module__", "") == _QUIET for hook in hooks)
