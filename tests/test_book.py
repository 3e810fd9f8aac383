"""The bounds of what the book promises its readers; `python tests/book.py` prints all of it."""

import book
import pytest


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return book.measures()


@pytest.mark.parametrize(
    "what, most",
    [
        ("cells to the first KL", 60),
        ("cells to the first distilled model", 60),
        ("lines of a code cell, median", 15),
        ("lines of a code cell, 90th percentile", 40),
        ("share of code lines over 100 columns", 0.02),
    ],
)
def test_a_reader_is_soon_there_and_meets_short_cells(measured, what, most):
    assert 0 < measured[what] <= most


def test_figures_say_what_was_found(measured):
    assert measured["figures of the results"] > 30
    assert measured["share of these with a finding as title"] >= 0.8


def test_a_figure_without_a_title_is_counted():
    saved = "save_figure(fig, run_dir, 'x', rows, alt{})"
    assert book.figures(saved.format("")) == [False]
    assert book.figures(saved.format(", title=finding")) == [True]
    assert book.figures("fig.suptitle(finding)\n" + saved.format("")) == [True]
    assert book.figures("ax.set(title='loss')\n" + saved.format("")) == [False]


def test_cells_are_counted_in_the_order_of_the_book():
    first, second = (len(book.load(path)) for path in book.in_order()[:2])
    assert first < book.cells_until(book.DISTILLED) <= first + second
    with pytest.raises(ValueError, match="no cell"):
        book.cells_until(book.re.compile("no such code, anywhere"))
