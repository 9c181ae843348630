"""Results as text: grids for terminal and markdown, and a sentence per method.

A *grid* contains one quantity for every method at every length, such as perplexity, gain, or passkeys. The truncation
control is a row of the perplexity grid: the same tokens, scored by the unpatched model with its context cut to the
trained length. Untrusted names, labels, and commands are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..escaping import cell, code, inline, visible
from ..evaluation.rows import share_interval, title
from ..evaluation.windows import is_legacy
from ..methods.text import by_reason
from ..scheme import KINDS

if TYPE_CHECKING:
    from ..evaluation import Results


NOTHING = "-"
SHORT_CONTEXT = "Short-context check"
"""Beginning of the title of the first table."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """Table of one quantity for every method at every length.

    A row without cells is the heading of the rows below it. Reports print `remark` below the grid.
    """

    title: str
    lengths: tuple[int, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    remark: str = ""


def scheme_name(results: Results) -> str:
    """Return the scheme of the model and its behavior past the trained length, such as `"RoPE: interpolation"`."""
    kind, generalization = results.provenance.get("kind"), results.provenance.get("generalization")
    words = "no generalization" if generalization == "none" else generalization
    label = KINDS[kind].label if kind in KINDS else kind
    return "unknown scheme" if kind is None else f"{label}: {words}"


def row_name(row: Row) -> str:
    """Return the display name of a row: the method, and its factor unless that is 1 (`"yarn x8"`)."""
    return title(row["method"], row["factor"])


def by_method(results: Results) -> dict[str, dict[int, Row]]:
    """Group the rows by display name in order of measurement, each in ascending order of length."""
    methods: dict[str, dict[int, Row]] = {}
    for row in results.rows:
        methods.setdefault(row_name(row), {})[row["length"]] = row
    return {name: dict(sorted(rows.items())) for name, rows in methods.items()}


def lengths_of(results: Results) -> tuple[int, ...]:
    """Return all measured lengths, ascending."""
    return tuple(sorted({row["length"] for row in results.rows}))


def legacy_mark(results: Results) -> str:
    """Return the mark for numbers of legacy protocols; an empty text for other protocols."""
    names = dict.fromkeys(row["protocol"] for row in results.rows if is_legacy(row["protocol"]))
    return f"({', '.join(names)}: a published average, not per token)" if names else ""


def control_rows(results: Results) -> dict[int, Row]:
    """Return one row per length that contains the control, which is the same for every method."""
    rows = {row["length"]: row for row in results.rows if row.get("perplexity_truncated_tail") is not None}
    return dict(sorted(rows.items()))


def control_name(results: Results) -> str:
    """Return the name of the control, with the trained length if known."""
    trained = results.provenance.get("trained_length")
    return "truncated" if trained is None else f"truncated to {trained}"


def format_perplexity(value: float | None) -> str:
    """Format a perplexity with two decimals below 10, one below 100, none below a million, and as `1.2e+06` above."""
    if value is None:
        return NOTHING
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def finite_interval(row: Row, key: str) -> tuple[float, float] | None:
    """Return the interval of a row, or `None` unless both ends are finite (JSON contains `None` for infinity)."""
    ends = [end for end in row.get(key) or () if end is not None and math.isfinite(end)]
    return (ends[0], ends[1]) if len(ends) == 2 else None


def format_interval(interval: Sequence[float] | None) -> str:
    """Format a 95 % interval of a ratio as `" [0.87, 0.91]"`; `None` as an empty text."""
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


def format_change(row: Row) -> str:
    """Format a change with its interval in per cent, such as `"+9.5 % [+9.0, +10.1]"`."""
    if row.get("change") is None:
        return NOTHING
    interval = finite_interval(row, "change_ci95")
    ends = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return f"{100 * row['change']:+.1f} %{ends}"


def notes(results: Results) -> list[str]:
    """Return notes on gaps in the tables: omitted methods and documents, and checks without a result."""
    refusals = by_reason(results.provenance.get("not_applicable") or {})
    sentences = [f"Left out: {', '.join(names)} ({reason})." for reason, names in refusals.items()]
    for entry in results.provenance.get("left_out") or ():
        if "reason" in entry:  # entries without a reason are too short, and are listed in the provenance
            kind, name = next(iter(entry.items()))  # a document, or a task of a method
            where = f" in {entry['run']}" if "run" in entry else ""  # only in merged runs
            sentences.append(f"Left out: {kind} {short_name(str(name))}{where} ({entry['reason']}).")
    trained = results.provenance.get("trained_length")
    if trained and not results.short_context() and any(row["method"] != "none" for row in results.rows):
        is_measured = lengths_of(results)[0] <= trained
        missing = f"no length up to {trained} was measured"
        if is_measured:
            missing = "none is not among the methods" if control_rows(results) else "there was no control"
        sentences.append(f"No short-context check: {missing}.")
    longppl = results.provenance.get("longppl")
    if longppl and all(row.get("longppl") is None for row in results.rows):
        evaluator, short_length = longppl["evaluator"], longppl["short_length"]
        sentences.append(
            f"No LongPPL: {evaluator} found no token that needs more than {short_length} tokens of context."
        )
    return sentences


def grids(results: Results) -> list[Grid]:
    """Return the grids of all measured quantities.

    The order is short-context check, perplexity, gain, LongPPL, passkeys, retrieval, and bits per byte. Only the
    perplexity is always present.
    """
    lengths, methods, control = lengths_of(results), by_method(results), control_rows(results)
    mark = legacy_mark(results)
    chat = ", in the chat template" if results.provenance.get("chat") else ""

    def cells(rows: Mapping[int, Row], text: Callable[[Row], str]) -> tuple[str, ...]:
        return tuple(text(rows[length]) if length in rows else NOTHING for length in lengths)

    def grid(title: str, text: Callable[[Row], str], remark: str = "") -> Grid:
        return Grid(title, lengths, tuple((name, cells(rows, text)) for name, rows in methods.items()), remark)

    def has(key: str) -> bool:
        return any(row.get(key) is not None for row in results.rows)

    short_context = results.short_context()
    tables = []
    if short_context:
        changes = tuple((row_name(row), (format_change(row),)) for row in short_context)
        title = f"{SHORT_CONTEXT}: change of perplexity inside the trained length {mark}".rstrip()
        tables.append(Grid(title, (short_context[0]["length"],), changes))
    title = f"Perplexity {mark}" if mark else "Perplexity per token (second half of the text in brackets)"
    perplexity = grid(title, _perplexity)
    if control:
        truncated = (control_name(results), cells(control, lambda row: _perplexity(row, "_truncated")))
        perplexity = replace(perplexity, rows=(truncated, *perplexity.rows))
    tables.append(perplexity)
    if control:
        title = f"Gain over truncation{f' {mark}' if mark else ', second half'} (above 1: the longer context pays)"
        # Only the longest length has an interval, because four intervals do not fit in 80 columns.
        tables.append(grid(title, lambda row: _gain(row, with_interval=row["length"] == lengths[-1])))
    if has("longppl"):
        tables.append(_longppl_grid(results))
    if has("passkey"):
        trials = next((f", {row['passkey_trials']} trials" for row in results.rows if row.get("passkey_trials")), "")
        at_longest = {name: rows[lengths[-1]] for name, rows in methods.items() if lengths[-1] in rows}
        shares = {name: [(row.get("passkey"), row.get("passkey_trials"))] for name, row in at_longest.items()}
        title = f"Passkeys retrieved (greedy decoding{trials}{chat})"
        tables.append(grid(title, lambda row: _per_cent([row.get("passkey")]), _intervals(shares, lengths[-1])))
    if results.retrieval:
        tables.append(_retrieval_grid(results, lengths, chat))
    if has("bits_per_byte"):
        title = "Bits per byte of text (comparable across tokenizers)"
        tables.append(grid(title, lambda row: _number(row.get("bits_per_byte"), "{:.3f}")))
    return tables


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _per_cent(shares: Iterable[float | None]) -> str:
    """Return the mean of the known shares in per cent."""
    known = [share for share in shares if share is not None]
    return f"{100 * sum(known) / len(known):.0f} %" if known else NOTHING


def _perplexity(row: Row, suffix: str = "") -> str:
    whole, tail = (format_perplexity(row[f"perplexity{suffix}{part}"]) for part in ("", "_tail"))
    return whole if is_legacy(row["protocol"]) else f"{whole} ({tail})"


def _gain(row: Row, with_interval: bool) -> str:
    interval = finite_interval(row, "gain_ci95") if with_interval else None
    return _number(row.get("gain"), f"{{:.2f}}{format_interval(interval)}")


def _longppl_grid(results: Results) -> Grid:
    rows = [row for row in results.rows if row.get("longppl") is not None]
    cells = []
    for row in rows:
        interval = finite_interval(row, "longppl_ci95")
        ends = "" if interval is None else f" [{format_perplexity(interval[0])}, {format_perplexity(interval[1])}]"
        cells.append((row_name(row), (f"{format_perplexity(row['longppl'])}{ends}",)))
    if rows[0].get("longppl_truncated") is not None:
        cells.insert(0, (control_name(results), (format_perplexity(rows[0]["longppl_truncated"]),)))
    evaluator = (results.provenance.get("longppl") or {}).get("evaluator", "an evaluator")
    title = f"LongPPL: perplexity of the {rows[0]['key_tokens']} key tokens that {evaluator} found"
    return Grid(title, (rows[0]["length"],), tuple(cells))


def _retrieval_grid(results: Results, lengths: tuple[int, ...], chat: str) -> Grid:
    tasks: dict[str, dict[str, dict[int, list[Row]]]] = {}
    for row in results.retrieval:
        by_length = tasks.setdefault(row["task"], {}).setdefault(row_name(row), {})
        by_length.setdefault(row["length"], []).append(row)
    rows: list[tuple[str, tuple[str, ...]]] = []
    shares = {}
    for task, methods in tasks.items():
        rows.append((task, ()))
        for name, by_length in methods.items():
            rows.append((name, tuple(_per_cent(row["accuracy"] for row in by_length.get(n, ())) for n in lengths)))
            depths = by_length.get(lengths[-1], ())
            shares[f"{task}, {name}"] = [(row["accuracy"], row["trials"]) for row in depths]
    trials = results.retrieval[0]["trials"]
    title = f"Retrieval: share found, mean over depths (trials at each: {trials}{chat})"
    return Grid(title, lengths, tuple(rows), _intervals(shares, lengths[-1]))


def _intervals(shares: Mapping[str, Sequence[tuple[float | None, int | None]]], length: int) -> str:
    """Return a sentence with the 95 % interval of each share, pooled over its pairs of share and trials."""
    texts = []
    for name, pairs in shares.items():
        known = [(share, trials) for share, trials in pairs if share is not None and trials]
        if known:
            trials = sum(count for _, count in known)
            share = sum(share * count for share, count in known) / trials
            low, high = share_interval(share, trials)
            texts.append(f"{name} {100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {trials}")
    return f"At {length} tokens, with 95 % intervals (Wilson): {'; '.join(texts)}." if texts else ""


def markdown_table(grid: Grid) -> str:
    """Return the grid as a GitHub markdown table without its title. Inner headings are bold."""
    header = ["tokens", *map(str, grid.lengths)]
    blank = [""] * len(grid.lengths)
    body = [[cell(name), *map(cell, cells)] if cells else [f"**{cell(name)}**", *blank] for name, cells in grid.rows]
    lines = [header, ["---", *["---:"] * len(grid.lengths)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# A method counts as broken once its perplexity exceeds that of the shortest length by a quarter, relative to the
# control if there is one. Above this value, the curves of all measured methods rise steeply.
TOLERANCE = 1.25


def describe_methods(results: Results) -> list[str]:
    """Return one sentence per method: its reach, its cost inside the trained length, its gain, and its passkeys."""
    control = control_rows(results)
    trained_length = results.provenance.get("trained_length") or 0
    mark = inline(legacy_mark(results))
    sentences = []
    for name, rows in by_method(results).items():
        parts = [_reach(rows, control, trained_length)]
        inside = [row for length, row in rows.items() if length <= trained_length and row.get("change") is not None]
        if inside and name != "none":
            parts.append(_cost(inside[-1]))
        longest = rows[max(rows)]
        if longest.get("gain") is not None:
            parts.append(_against_truncation(longest))
        if longest.get("passkey") is not None:
            parts.append(f"it retrieves {100 * longest['passkey']:.0f} % of the passkeys there")
        sentences.append(f"{code(name)} {f'{mark} ' if mark else ''}{'; '.join(parts)}.")
    return sentences


def _reach(rows: Mapping[int, Row], control: Mapping[int, Row], trained_length: int) -> str:
    """Describe up to which length a method keeps its tail perplexity, relative to the control if it is known."""
    # In files infinite perplexities are `None`.
    tails = {
        length: math.inf if row["perplexity_tail"] is None else row["perplexity_tail"] for length, row in rows.items()
    }
    lengths, levels = list(tails), dict(tails)
    if math.isinf(tails[lengths[0]]):
        where = "" if all(map(math.isinf, tails.values())) else f" at {lengths[0]} tokens"
        return f"gave no finite perplexity{where}"
    first, longest = lengths[0], lengths[-1]
    shown = {length: format_perplexity(tail) for length, tail in tails.items()}
    quantity = "perplexity" if is_legacy(rows[first]["protocol"]) else "tail perplexity"
    if all(length in control for length in tails):
        truncated = {length: control[length]["perplexity_truncated_tail"] for length in tails}
        levels = {length: tail / truncated[length] for length, tail in tails.items()}
        # Without a length within the trained one, the method has no level of its own, and truncation has 1.
        if first > trained_length > 0 and levels[first] > TOLERANCE:
            figures = f"({quantity} {shown[first]}, and {format_perplexity(truncated[first])} truncated)"
            return f"is broken at {first} tokens {figures}"
    broken = next((length for length in lengths[1:] if not levels[length] <= TOLERANCE * levels[first]), None)
    if broken is not None:
        figures = f"({quantity} {shown[first]} at {first}, {shown[broken]} there)"
        return f"holds up to {lengths[lengths.index(broken) - 1]} tokens and breaks by {broken} {figures}"
    if len(lengths) == 1:
        return f"has a {quantity} of {shown[first]} at {first} tokens"
    figures = f"({quantity} {shown[first]} at {first}, {shown[longest]} at {longest})"
    return f"keeps its perplexity level to {longest} tokens {figures}"


def _cost(row: Row) -> str:
    """Describe the cost of the extension inside the trained length."""
    change, interval = row["change"], finite_interval(row, "change_ci95")
    verb = "costs" if change >= 0 else "saves"
    if change < 0 and interval is not None:  # of what is saved
        interval = -interval[1], -interval[0]
    share, *ends = _per_cents(abs(change), *(interval or ()))
    span = f" [{', '.join(ends)}]" if ends else ""
    return f"inside the trained length, at {row['length']}, it {verb} {share} %{span} of perplexity"


def _against_truncation(row: Row) -> str:
    gain, interval = row["gain"], finite_interval(row, "gain_ci95")
    figures = f"(gain {gain:.2f}{format_interval(interval)})"
    length = row["length"]
    if round(gain, 3) == 1 or ((interval[0] <= 1 <= interval[1]) if interval else round(gain, 2) == 1):
        return f"at {length} it is level with truncation {figures}"
    if gain < 0.5:
        return f"at {length} its perplexity is {1 / gain if gain else math.inf:.1f} times that of truncation {figures}"
    verb, (share,) = "loses" if gain < 1 else "gains", _per_cents(abs(gain - 1))
    return f"at {length} it {verb} {share} % {'to' if gain < 1 else 'over'} truncation {figures}"


def _per_cents(*shares: float) -> list[str]:
    """Return shares in whole per cent, or with a decimal if the first one is below one per cent."""
    digits = 0 if round(100 * shares[0]) else 1
    return [f"{round(100 * share, digits) + 0.0:.{digits}f}" for share in shares]  # + 0.0: no minus before 0


WIDTH = 80
LONGEST = 100
"""Most characters of a name on the terminal and in pictures. Files contain the whole name."""

# Room for "theta x128" or "truncated to 131072". Longer names are folded.
NAME_WIDTH = 20
GAP = 3  # spaces between columns, including the rule that rich's box leaves blank
HEAD = "tokens"
"""Heading of the column of names, which is the unit of the other headings."""


def one_line(text: str) -> str:
    """Return an untrusted text on one line, with visible control characters."""
    return visible(" ".join(text.split()))


def short_name(name: str) -> str:
    """Return an untrusted name on one line of at most 100 characters, with visible control characters."""
    line = one_line(name)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}\u2026"


def _column_groups(grid: Grid, name_width: int) -> list[list[int]]:
    """Split the columns of a grid into groups that fit the terminal beside the names."""
    groups: list[list[int]] = [[]]
    used = name_width
    for column, length in enumerate(grid.lengths):
        width = GAP + max(len(str(length)), *(len(cells[column]) for _, cells in grid.rows if cells))
        if groups[-1] and used + width > WIDTH:
            groups.append([])
            used = name_width
        groups[-1].append(column)
        used += width
    return groups


def print_grids(tables: Sequence[Grid], remarks: Sequence[str], console: Console | None = None) -> None:
    """Print every grid in at most 80 columns, then the remarks. A wide grid continues below itself."""
    console = console or Console(width=WIDTH, highlight=False)
    names = [HEAD, *(short_name(name) for grid in tables for name, _ in grid.rows)]
    name_width = min(NAME_WIDTH, max(map(cell_len, names)))
    for grid in tables:
        console.print(escape(one_line(grid.title)), style="bold")
        for columns in _column_groups(grid, name_width):
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, GAP - 1), pad_edge=False, show_edge=False)
            table.add_column(HEAD, width=name_width, overflow="fold")
            for column in columns:
                table.add_column(str(grid.lengths[column]), justify="right", no_wrap=True)
            for name, cells in grid.rows:
                values = [cells[column] for column in columns if cells]
                table.add_row(escape(short_name(name)), *values, style=None if cells else "bold")
            console.print(table)
            console.print()
    for remark in remarks:
        console.print(escape(one_line(remark)))


def print_tables(results: Results, console: Console | None = None) -> None:
    """Print the grids and notes of one comparison."""
    print_grids(grids(results), notes(results), console)
