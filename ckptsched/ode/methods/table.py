"""The table of explicit Runge-Kutta methods, by name.

Coefficients are those of the papers named; `ButcherTableau` proves each of them right when the
table is made: order, embedded order, and the state halfway.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...base.errors import WorkloadError
from .tableau import ButcherTableau


def _less(b: tuple[float, ...], embedded: tuple[float, ...]) -> tuple[float, ...]:
    """Weights of a method less those of its embedded method."""
    return tuple(weight - other for weight, other in zip(b, embedded, strict=True))


EULER = ButcherTableau(name="euler", order=1, a=((),), b=(1.0,), c=(0.0,))
"""One slope, at the start: the step of a residual network."""

MIDPOINT = ButcherTableau(name="midpoint", order=2, a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2))
"""The slope halfway; what the code released with ANODE calls RK2."""

HEUN = ButcherTableau(
    name="heun",
    order=2,
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    c=(0.0, 1.0),
    b_error=(-1 / 2, 1 / 2),
    embedded_order=1,
    mid=(3 / 8, 1 / 8),
)
"""The explicit trapezoidal rule: the mean of the slopes at both ends; Euler's step embedded."""

RALSTON = ButcherTableau(
    name="ralston", order=2, a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0.0, 2 / 3)
)
"""The two slopes whose error bound is least (Ralston, Math. Comp. 16, 1962)."""

HEUN3 = ButcherTableau(
    name="heun3",
    order=3,
    a=((), (1 / 3,), (0.0, 2 / 3)),
    b=(1 / 4, 0.0, 3 / 4),
    c=(0.0, 1 / 3, 2 / 3),
)
"""Heun's method of order three."""

BOSH3 = ButcherTableau(
    name="bosh3",
    order=3,
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    b_error=_less((2 / 9, 1 / 3, 4 / 9, 0.0), (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
    embedded_order=2,
    # The cubic through both ends and their slopes.
    mid=(1 / 9 + 1 / 8, 1 / 6, 2 / 9, -1 / 8),
)
"""Bogacki and Shampine's pair of orders 3 and 2 (Appl. Math. Lett. 2, 1989)."""

RK4 = ButcherTableau(
    name="rk4",
    order=4,
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 1 / 2, 1 / 2, 1.0),
)
"""The classic method of order four."""

RK4_38 = ButcherTableau(
    name="rk4_38",
    order=4,
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    c=(0.0, 1 / 3, 2 / 3, 1.0),
)
"""Kutta's 3/8 rule: order four with a smaller error; what torchdiffeq calls rk4."""

_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)

DOPRI5 = ButcherTableau(
    name="dopri5",
    order=5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B,
    ),
    b=(*_DOPRI5_B, 0.0),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    b_error=_less(
        (*_DOPRI5_B, 0.0),
        (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60),
    ),
    embedded_order=4,
    mid=(
        *(6025192743 / 60171106304, 0.0, 51252292925 / 130801643196, -2691868925 / 90256659456),
        *(187940372067 / 3189068634112, -1776094331 / 39487288512, 11237099 / 470086768),
    ),
)
"""Dormand and Prince's pair of orders 5 and 4 (J. Comp. Appl. Math. 6, 1980), with Shampine's
embedded weights and his state halfway (Math. Comp. 46, 1986); the paper's RK45."""

_TSIT5_B = (
    *(0.09646076681806523, 0.01, 0.4798896504144996),
    *(1.379008574103742, -3.290069515436081, 2.324710524099774),
)

TSIT5 = ButcherTableau(
    name="tsit5",
    order=5,
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (
            *(5.86145544294642, -12.92096931784711, 8.159367898576159),
            *(-0.071584973281401, -0.028269050394068383),
        ),
        _TSIT5_B,
    ),
    b=(*_TSIT5_B, 0.0),
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    b_error=(
        *(-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995),
        *(-0.1447110071732629, 0.5823571654525552, -0.45808210592918697, 1 / 66),
    ),
    embedded_order=4,
    # The published interpolant, halfway.
    mid=(
        *(0.10741235230096871, 0.01135625, 0.39560903056045305),
        *(-0.34475214352593553, 1.3161853649581645, -1.0170608542936508, 1 / 32),
    ),
)
"""Tsitouras' pair of orders 5 and 4 (Comput. Math. Appl. 62, 2011)."""

_DOPRI8_B = (
    *(14005451 / 335480064, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825, 181606767 / 758867731),
    *(561292985 / 797845732, -1041891430 / 1371343529, 760417239 / 1151165299),
    *(118820643 / 751138087, -528747749 / 2220607170, 1 / 4),
)
_DOPRI8_EMBEDDED = (
    *(13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -808719846 / 976000145, 1757004468 / 5645159321),
    *(656045339 / 265891186, -3867574721 / 1518517206, 465885868 / 322736535),
    *(53011238 / 667516719, 2 / 45, 0.0),
)

DOPRI8 = ButcherTableau(
    name="dopri8",
    order=8,
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            *(29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347),
            *(-28693883 / 1125000000, 23124283 / 1800000000),
        ),
        (
            *(16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777),
            *(545815736 / 2771057229, -180193667 / 1043307555),
        ),
        (
            *(39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301),
            *(100302831 / 723423059, 790204164 / 839813087, 800635310 / 3783071287),
        ),
        (
            *(246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246),
            *(-309121744 / 1061227803, -12992083 / 490766935, 6005943493 / 2108947869),
            *(393006217 / 1396673457, 123872331 / 1001029789),
        ),
        (
            *(-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852),
            *(1311729495 / 1432422823, -10304129995 / 1701304382, -48777925059 / 3047939560),
            *(15336726248 / 1032824649, -45442868181 / 3398467696, 3065993473 / 597172653),
        ),
        (
            *(185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517),
            *(-703635378 / 230739211, 5731566787 / 1027545527, 5232866602 / 850066563),
            *(-4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083),
        ),
        (
            *(403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805),
            *(652783627 / 914296604, 11173962825 / 925320556, -13158990841 / 6184727034),
            *(3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0.0),
        ),
        _DOPRI8_B,
    ),
    b=(*_DOPRI8_B, 0.0),
    c=(
        *(0.0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200),
        *(5490023248 / 9719169821, 13 / 20, 1201146811 / 1299019798, 1.0, 1.0, 1.0),
    ),
    b_error=(*_less(_DOPRI8_B, _DOPRI8_EMBEDDED), 0.0),
    embedded_order=7,
    mid=(
        *(0.04103130360739393, 0.0, 0.0, 0.0, 0.0, 0.05100562801991382, 0.2388930677412202),
        *(0.3096870143996103, -0.2172325471755352, 0.07833405679331928, -0.0018614369715579948),
        *(0.007072844202678841, 0.00690847373200576, -0.013838404349047373),
    ),
)
"""Prince and Dormand's pair of orders 8 and 7 with 13 slopes (J. Comp. Appl. Math. 7, 1981), and
as a fourteenth the slope at the end, which is the next step's first."""

_TABLE = (EULER, MIDPOINT, HEUN, RALSTON, HEUN3, BOSH3, RK4, RK4_38, DOPRI5, TSIT5, DOPRI8)
METHODS: Mapping[str, ButcherTableau] = MappingProxyType(
    {tableau.name: tableau for tableau in _TABLE}
)
"""Every method by its name. There is no "rk2": the ANODE paper's is Heun's to some readers and
the midpoint rule in its released code."""


def find_tableau(method: str | ButcherTableau) -> ButcherTableau:
    """The coefficients of a method.

    Args:
        method: A name in `METHODS`, or a tableau, which is handed back.

    Raises:
        WorkloadError: There is no such name.
    """
    if isinstance(method, ButcherTableau):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    raise WorkloadError(
        f"unknown method {method!r}; give one of {', '.join(map(repr, METHODS))} "
        "or a ButcherTableau"
    )
