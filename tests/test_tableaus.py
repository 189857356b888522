"""Tableaus check themselves: right ones pass at their order, wrong ones say what is wrong."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsched.ode import EULER, HEUN, METHODS, MIDPOINT, RK4, ButcherTableau, find_tableau
from tests.other_methods import DOPRI5, DORMAND_PRINCE, KUTTA3, make_tableau

TABLEAUS = [EULER, MIDPOINT, HEUN, RK4]


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda t: t.name)
def test_lookup_by_name_and_by_tableau(method: ButcherTableau) -> None:
    assert find_tableau(method.name) is method
    assert find_tableau(method) is method


@pytest.mark.parametrize("method", ["RK4", "rk2", "dopri5", "", None, 4])
def test_an_unknown_method_is_refused_with_the_known_ones(method: object) -> None:
    with pytest.raises(ValueError, match="unknown method") as caught:
        find_tableau(method)  # type: ignore[arg-type]
    assert all(repr(name) in str(caught.value) for name in METHODS)


@pytest.mark.parametrize("fields", [KUTTA3, DOPRI5], ids=["kutta3", "dopri5"])
def test_other_methods_pass_the_checks_at_their_order_and_fail_above(fields: dict) -> None:
    assert make_tableau("mine", **fields).slopes == len(fields["b"])
    with pytest.raises(ValueError, match=f"state order={fields['order']} if"):
        make_tableau("mine", **{**fields, "order": fields["order"] + 1})


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda t: t.name)
def test_no_method_has_a_higher_order_than_it_states(method: ButcherTableau) -> None:
    with pytest.raises(ValueError, match="order condition"):
        ButcherTableau(name="more", order=method.order + 1, a=method.a, b=method.b, c=method.c)


@given(data=st.data())
def test_a_tableau_with_one_wrong_coefficient_is_refused(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from([*TABLEAUS, DORMAND_PRINCE]))
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


@pytest.mark.parametrize("method", [RK4, DORMAND_PRINCE])
@given(data=st.data())
def test_the_order_conditions_see_what_the_row_sums_do_not(
    method: ButcherTableau, data: st.DataObject
) -> None:
    row = data.draw(st.integers(2, method.slopes - 2))
    error = data.draw(st.floats(1e-6, 2.0))
    a = [list(entries) for entries in method.a]
    a[row][0] += error
    a[row][1] -= error
    with pytest.raises(ValueError, match="order condition for order"):
        ButcherTableau(
            name="broken", order=method.order, a=tuple(map(tuple, a)), b=method.b, c=method.c
        )


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
        ({"b": (0.0, 0.9)}, r"gives 0.9 in place of 1.0 \(the sum of b\)"),
    ],
)
def test_what_is_wrong_with_a_tableau_is_said(change: dict, message: str) -> None:
    fields = {"name": "m", "order": 2, "a": MIDPOINT.a, "b": MIDPOINT.b, "c": MIDPOINT.c}
    with pytest.raises(ValueError, match=message):
        ButcherTableau(**{**fields, **change})
