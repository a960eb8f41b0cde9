"""One line out of another library's error."""

import pytest

from curated_data.errors import first_line


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (RuntimeError("boom\nat line 3"), "boom", "RuntimeError: boom"),
        (AssertionError(), "AssertionError", "AssertionError"),
        (ValueError("x" * 1000), "x" * 300, "ValueError: " + "x" * 288),
    ],
)
def test_first_line(error, line, typed):
    assert first_line(error) == line
    assert first_line(error, with_type=True) == typed
