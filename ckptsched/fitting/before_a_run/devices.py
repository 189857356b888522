"""What devices can do, by the data sheets of their makers.

Rates are the dense ones, without sparsity, and peaks: kernels reach a share of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from ...base.errors import WorkloadError

_TERA, _GIGA = 1e12, 1e9


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFigures:
    """A device by its data sheet. Give one of your own where yours is not known."""

    name: str
    """As its maker calls it."""
    memory_bytes: int
    """All that it has."""
    bytes_per_second: float
    """Between its memory and its units."""
    flops_per_second: float
    """Operations of floating point a second in float32, as torch computes by default: no TF32."""
    half_flops_per_second: float
    """The same in float16, added up in float32."""
    bfloat16_flops_per_second: float
    """The same in bfloat16."""
    source: str
    """Where the figures stand."""

    def by_dtype(self) -> Mapping[str, float]:
        """Operations a second by name of dtype."""
        return {
            "float16": self.half_flops_per_second,
            "bfloat16": self.bfloat16_flops_per_second,
        }


def _device(
    name: str, gigabytes: int, gigabytes_s: float, single: float, half: float, brain: float, at: str
) -> DeviceFigures:
    """A line of the table: memory in 10^9 bytes, rates in 10^9 bytes and 10^12 operations."""
    return DeviceFigures(
        name=name,
        memory_bytes=gigabytes * 10**9,
        bytes_per_second=gigabytes_s * _GIGA,
        flops_per_second=single * _TERA,
        half_flops_per_second=half * _TERA,
        bfloat16_flops_per_second=brain * _TERA,
        source=at,
    )


DEVICES: Mapping[str, DeviceFigures] = {
    device.name: device
    for device in (
        _device("A100-40GB", 40, 1555, 19.5, 312, 312, "NVIDIA A100 data sheet, SXM4 40 GB"),
        _device("A100", 80, 2039, 19.5, 312, 312, "NVIDIA A100 data sheet, SXM4 80 GB"),
        _device("H100", 80, 3350, 67, 989.5, 989.5, "NVIDIA H100 data sheet, SXM5"),
        _device("H200", 141, 4800, 67, 989.5, 989.5, "NVIDIA H200 data sheet, SXM5"),
        _device("RTX 4090", 24, 1008, 82.6, 165.2, 165.2, "NVIDIA Ada architecture white paper"),
        _device("L4", 24, 300, 30.3, 121, 121, "NVIDIA L4 data sheet"),
        # Its tensor cores know no bfloat16.
        _device("T4", 16, 320, 8.1, 65, 8.1, "NVIDIA T4 data sheet"),
        _device("MI300X", 192, 5300, 163.4, 1307.4, 1307.4, "AMD Instinct MI300X data sheet"),
    )
}


def find_device(asked: str | DeviceFigures) -> DeviceFigures:
    """The figures of a device.

    Args:
        asked: A name of `DEVICES`, in any case and with or without blanks; or figures, as they are.

    Raises:
        WorkloadError: The name is not known.
    """
    if isinstance(asked, DeviceFigures):
        return asked
    plain = {_plain(name): name for name in DEVICES}
    found = plain.get(_plain(asked)) if isinstance(asked, str) else None
    if found is None:
        near = difflib.get_close_matches(_plain(str(asked)), plain, n=1, cutoff=0.5)
        hint = f"did you mean {plain[near[0]]}? " if near else ""
        raise WorkloadError(
            f"the device {asked!r} is not known; {hint}Known are {', '.join(DEVICES)}; for another "
            "give DeviceFigures, or its memory alone"
        )
    return DEVICES[found]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()).removeprefix("nvidia")
