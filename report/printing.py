"""Fields and tables on the terminal. Nothing is ever cut or left out: a finding that nobody sees was not found.

A line that is longer than the terminal is broken by the terminal, and copied from it as one line. Where output goes
into a file or a pipe, every field of :class:`Fields` and every row of :func:`print_table` is one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

Cell = str | tuple[str, str]
"""A text, or a text and its style on a terminal that has colours."""

_GAP = 2


def can_show(text: str) -> bool:
    """Whether the output's encoding has all these characters; if not, they are spelled out."""
    try:
        text.encode(Console().encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def print_line(text: Cell = "") -> None:
    """Print one line."""
    _print(_styled(text))


class Fields:
    """Names and values, printed with the values below one another."""

    def __init__(self) -> None:
        self._rows: list[tuple[Text, Text]] = []

    def add(self, name: str, value: Cell) -> None:
        """Add a field; one without a name continues the one before."""
        self._rows.append((_styled(name), _styled(value)))

    def print(self) -> None:
        """Print them all."""
        width = max((name.cell_len for name, _ in self._rows), default=0)
        for row in self._rows:
            _print(_in_columns(row, [width]))


def print_table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print rows below one another, or, on a terminal that is too narrow, every row as fields."""
    cells = [[_styled(cell) for cell in row] for row in rows]
    widths = [max(cell_len(name), *(row[i].cell_len for row in cells), 0) for i, name in enumerate(header)]
    console = Console()
    if console.is_terminal and sum(widths) + _GAP * (len(widths) - 1) > console.width:
        for number, row in enumerate(cells):
            if number:
                _print(Text())
            for name, cell in zip(header, row, strict=True):
                _print(_in_columns((Text(name), cell), [max(map(cell_len, header))]))
        return
    _print(_in_columns([Text(name, "bold") for name in header], widths))
    for row in cells:
        _print(_in_columns(row, widths))


def _in_columns(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    line = Text()
    for number, cell in enumerate(cells):
        line.append_text(cell)
        if number < len(cells) - 1:
            line.append(" " * (widths[number] - cell.cell_len + _GAP))
    line.rstrip()
    return line


def _styled(cell: Cell) -> Text:
    text, style = (cell, "") if isinstance(cell, str) else cell
    return Text(on_one_line(text), style)


def on_one_line(text: str) -> str:
    """Spell out what would break the line or speak to the terminal: names and findings may come from other machines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _print(line: Text) -> None:
    Console().print(line, soft_wrap=True, highlight=False)
