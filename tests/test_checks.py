"""Single values are checked in one way, whatever type they are of."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curated_data.checks import check_choice, whole_number
from curated_data.errors import ConfigError


@given(st.integers(-(2**40), 2**40), st.integers(-10, 10))
def test_integers_of_any_type_are_those_from_the_least_on(value, least):
    for given_value in (value, np.int64(value)):
        if value >= least:
            found = whole_number("n", given_value, least)
            assert found == value
            assert type(found) is int
        else:
            with pytest.raises(ConfigError, match=rf"^n: .*{least}, .*{re.escape(repr(given_value))}"):
                whole_number("n", given_value, least)


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, "1", None, [1]])
def test_what_is_no_integer_is_named(value):
    with pytest.raises(ConfigError, match=f"^n: .*{re.escape(repr(value))}"):
        whole_number("n", value)


def test_a_choice_that_there_is_not_names_the_nearest():
    check_choice("mode", "min", ("min", "max"))
    with pytest.raises(ConfigError, match=r"^mode: .*min, max.*'mix'.*'min'"):
        check_choice("mode", "mix", ("min", "max"))
