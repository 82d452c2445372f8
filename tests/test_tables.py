"""Tables show the same in a terminal and in a notebook."""

import pytest

from companion import tables


def test_text_is_aligned_and_html_is_escaped():
    table = tables.Table(("name", "value"), [("a", "1"), ("<long>", "2")])
    assert str(table) == "name    value\na       1\n<long>  2"
    assert "&lt;long&gt;" in table._repr_html_()
    assert table._repr_html_().count("<tr>") == 3
    assert "<a href=x>" in tables.Table((), [(tables.Html("<a href=x>"), "1")])._repr_html_()


def test_rows_must_have_as_many_cells_as_the_head():
    with pytest.raises(ValueError, match=r"different numbers of cells: \[1, 2\]"):
        tables.Table(("a", "b"), [("1",)])


def test_numbers_are_short():
    assert tables.short(12345.6) == "12,346"
    assert tables.short(0.0123456) == "0.01235"
    assert tables.short(0.0123456, 2) == "0.012"
