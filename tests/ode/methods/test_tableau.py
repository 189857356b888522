"""Tableaus check themselves: right ones pass at their order, wrong ones say what is wrong."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsched.ode import (
    BOSH3,
    DOPRI5,
    DOPRI8,
    METHODS,
    MIDPOINT,
    RK4,
    TSIT5,
    ButcherTableau,
    find_tableau,
)

TABLEAUS = list(METHODS.values())
SMALL = [method for method in TABLEAUS if method.order <= 5]  # eight's conditions take 3 ms
PAIRS = [method for method in TABLEAUS if method.b_error is not None]
# A method that the package does not have.
KUTTA3 = {"order": 3, "a": ((), (0.5,), (-1.0, 2.0)), "b": (1 / 6, 2 / 3, 1 / 6)}


def make_tableau(name: str, *, order: int, a: tuple, b: tuple) -> ButcherTableau:
    """A tableau whose times are the sums of its rows."""
    return ButcherTableau(name=name, order=order, a=a, b=b, c=tuple(map(math.fsum, a)))


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda t: t.name)
def test_lookup_by_name_and_by_tableau(method: ButcherTableau) -> None:
    assert find_tableau(method.name) is method
    assert find_tableau(method) is method


@pytest.mark.parametrize("method", ["RK4", "rk2", "dopri9", "", None, 4])
def test_an_unknown_method_is_refused_with_the_known_ones(method: object) -> None:
    with pytest.raises(ValueError, match="unknown method") as caught:
        find_tableau(method)  # type: ignore[arg-type]
    assert all(repr(name) in str(caught.value) for name in METHODS)


def test_other_methods_pass_the_checks_at_their_order_and_fail_above() -> None:
    assert make_tableau("mine", **KUTTA3).slopes == 3
    with pytest.raises(ValueError, match="state order=3 if"):
        make_tableau("mine", **{**KUTTA3, "order": 4})


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda t: t.name)
def test_no_method_has_a_higher_order_than_it_states(method: ButcherTableau) -> None:
    with pytest.raises(ValueError, match="order condition"):
        ButcherTableau(name="more", order=method.order + 1, a=method.a, b=method.b, c=method.c)


@given(data=st.data())
def test_a_tableau_with_one_wrong_coefficient_is_refused(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(SMALL))
    error = data.draw(st.floats(1e-9, 2.0)) * data.draw(st.sampled_from([-1, 1]))
    places = [("b", i, None) for i in range(method.slopes)]
    places += [("c", i, None) for i in range(method.slopes)]
    places += [("a", i, j) for i, row in enumerate(method.a) for j in range(len(row))]
    field, i, j = data.draw(st.sampled_from(places))
    values = {"a": [list(row) for row in method.a], "b": list(method.b), "c": list(method.c)}
    if j is None:
        values[field][i] += error
    else:
        values[field][i][j] += error
    with pytest.raises(ValueError, match=r"sums to|order condition"):
        ButcherTableau(
            name="broken",
            order=method.order,
            a=tuple(map(tuple, values["a"])),
            b=tuple(values["b"]),
            c=tuple(values["c"]),
        )


@pytest.mark.parametrize("method", [RK4, DOPRI5, TSIT5])
@given(data=st.data())
def test_the_order_conditions_see_what_the_row_sums_do_not(
    method: ButcherTableau, data: st.DataObject
) -> None:
    row = data.draw(st.integers(2, method.evaluations - 2))
    error = data.draw(st.floats(1e-6, 2.0))
    a = [list(entries) for entries in method.a]
    a[row][0] += error
    a[row][1] -= error
    with pytest.raises(ValueError, match="order condition for order"):
        ButcherTableau(
            name="broken", order=method.order, a=tuple(map(tuple, a)), b=method.b, c=method.c
        )


@pytest.mark.parametrize("method", PAIRS, ids=lambda t: t.name)
def test_no_embedded_method_has_another_order_than_it_states(method: ButcherTableau) -> None:
    assert method.b_error is not None
    embedded = tuple(b - e for b, e in zip(method.b, method.b_error, strict=True))
    order = method.embedded_order
    fields = {"name": "embedded", "a": method.a, "b": embedded, "c": method.c}
    assert ButcherTableau(order=order, **fields).slopes == method.slopes
    with pytest.raises(ValueError, match=f"state order={order} if"):
        ButcherTableau(order=order + 1, **fields)


@given(data=st.data())
def test_wrong_error_weights_and_wrong_states_halfway_are_refused(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from([BOSH3, DOPRI5, TSIT5]))
    error = data.draw(st.floats(1e-9, 2.0)) * data.draw(st.sampled_from([-1, 1]))
    field = data.draw(st.sampled_from(["b_error", "mid"]))
    values = {"b_error": list(method.b_error or ()), "mid": list(method.mid or ())}
    values[field][data.draw(st.integers(0, method.slopes - 1))] += error
    with pytest.raises(ValueError, match="embedded method is off" if field == "b_error" else "mid"):
        ButcherTableau(
            name="broken",
            order=method.order,
            a=method.a,
            b=method.b,
            c=method.c,
            b_error=tuple(values["b_error"]),
            embedded_order=method.embedded_order,
            mid=tuple(values["mid"]),
        )


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda t: t.name)
def test_first_same_as_last_is_read_off_the_coefficients(method: ButcherTableau) -> None:
    assert method.is_fsal == (method.name in ("bosh3", "dopri5", "tsit5", "dopri8"))
    # On a fixed grid that last slope is not needed; all others are.
    assert method.needed == tuple(range(method.slopes - method.is_fsal))
    assert method.evaluations == len(method.needed)


def test_a_slope_that_nothing_reads_is_not_needed() -> None:
    idle = ButcherTableau(
        name="m", order=1, a=((), (1.0,), (0.5, 0.0)), b=(0.5, 0.0, 0.5), c=(0.0, 1.0, 0.5)
    )
    assert idle.needed == (0, 2)
    assert not idle.is_fsal
    through = ButcherTableau(
        name="m", order=1, a=((), (1.0,), (0.0, 0.5)), b=(0.0, 0.0, 1.0), c=(0.0, 1.0, 0.5)
    )
    assert through.needed == (0, 1, 2)


def test_the_quartic_of_order_eight_is_right_to_order_five() -> None:
    """Of which four are checked, as no quartic has more."""
    assert DOPRI8.mid is not None
    broken = (*DOPRI8.mid[:-1], DOPRI8.mid[-1] + 1e-9)
    with pytest.raises(ValueError, match="halfway"):
        dataclasses.replace(DOPRI8, mid=broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order is 0; give an int >= 1"),
        ({"order": True}, "order is True"),
        ({"b": (1.0,)}, "2 rows, b 1 and c 2"),
        ({"a": (), "b": (), "c": ()}, "at least one"),
        ({"a": ((), (1 / 2, 0.0))}, "row 1 of a has 2 entries; an explicit method has 1"),
        ({"a": ((), (math.nan,))}, "coefficient nan; all must be finite"),
        ({"c": (0.0, 1.0)}, r"row 1 of a sums to 0.5, but c\[1\] is 1.0"),
        ({"b_error": (1.0, -1.0)}, "embedded_order is 0; give that of the method"),
        ({"b_error": (1.0, -1.0), "embedded_order": 2}, "at least 1 and below 2"),
        ({"b_error": (0.0, 0.0), "embedded_order": 1}, "sees no error of order 2"),
        ({"b_error": (1.0,), "embedded_order": 1}, "b_error has 1 entries"),
        ({"embedded_order": 1}, "give both or neither"),
        ({"mid": (0.5, 0.0, 0.0)}, "mid has 3 entries; give one for each of the 2 slopes"),
        ({"mid": (0.5, 0.0)}, "halfway gives 0.0 in place of 0.125; correct mid"),
        ({"mid": (math.inf, 0.0)}, "coefficient inf"),
        ({"b": (0.0, 0.9)}, r"gives 0.9 in place of 1.0 \(the sum of b\)"),
    ],
)
def test_what_is_wrong_with_a_tableau_is_said(change: dict, message: str) -> None:
    fields = {"name": "m", "order": 2, "a": MIDPOINT.a, "b": MIDPOINT.b, "c": MIDPOINT.c}
    with pytest.raises(ValueError, match=message):
        ButcherTableau(**{**fields, **change})
