"""Tables for papers: methods by budgets of a task, methods by tasks at a budget; booktabs. Imports no torch.

What they state is what the table of `kvbench.report.aggregate` has. Best is bold; underlined is what can't be told from
it: the interval of the paired difference, on the same examples, contains 0.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from kvbench.cell import slug
from kvbench.errors import UsageError
from kvbench.plugins import known
from kvbench.report.best import Column, Row, compared, values
from kvbench.report.names import file_names, short
from kvbench.report.tidy import RUN, SETTING, alone, budget_order, finished

METRICS = {
    "score": "Score",
    "answer_nll": "Negative log-likelihood of the reference in nats per token",
    "kl_full": "KL divergence to the full cache in nats",
    "agree_full": "Top-1 agreement with the full cache",
}
WORDS = {"score": "score", "answer_nll": "NLL", "kl_full": "KL", "agree_full": "top-1"}
MADE = {
    "bootstrap": "bootstrap of documents",
    "t": "t interval, clustered by document",
    "exact": "exact where nothing varies",
    "none": "none where there is one document",
}
LINES = 36  # methods of a table on a page; longer ones go on in a second


# -- text --

_COMMANDS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    "`": r"\char96{}",
    "…": r"\ldots{}",
}
_ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u030c": "v", "\u0327": "c"}


def escape(text: str) -> str:
    """`text` as LaTeX prints it, whatever is in it; ASCII only, so that no encoding has to be set up.

    Braces keep hyphens, quotes and commas from becoming others where two meet, and a bracket or a star that opens a
    row from being an option of the line's end before it.
    """
    return re.sub(r"([-',])(?=\1)", r"{\1}", "".join(map(_character, text)))


@cache
def _character(one: str) -> str:
    if one in _COMMANDS:
        return _COMMANDS[one]
    if one in "{}$&#%_":
        return f"\\{one}"
    if one.isspace():
        return " "
    if one.isascii() and one.isprintable():
        return f"{{{one}}}" if one in "[]*" else one
    letter, accent = (*unicodedata.normalize("NFD", one), "")[:2]
    if letter.isascii() and letter.isalpha() and accent in _ACCENTS and len(unicodedata.normalize("NFD", one)) == 2:
        return f"\\{_ACCENTS[accent]}{{{letter}}}"
    return rf"{{\ttfamily U+{ord(one):04X}}}"


# -- tables --


@dataclass(frozen=True)
class Table:
    name: str  # of the file, and of the label
    text: str


def tables(table: pd.DataFrame, results: Path, metric: str = "score") -> list[Table]:
    """Methods by budgets for each model, protocol, seed and task; of several tasks methods by tasks for each budget."""
    known("metric", metric, METRICS)
    rows = table[table["metric"] == metric]
    rows = rows[rows.groupby(list(SETTING))["mean"].transform("count") > 0]
    if rows.empty:
        raise UsageError(f"no cell has {metric}")
    alone(rows)
    read = cache(lambda folder: values(results / folder, metric))
    settings = [part for _, part in rows.groupby(list(SETTING), sort=True)]
    found = []
    for name, part in zip(file_names([part.iloc[0] for part in settings]), settings, strict=True):
        columns = [compared(f"budget {budget}", _at(part, budget), read) for budget in _budgets(part)]
        what = f"on {part['task'].iloc[0]}, protocol {part['protocol'].iloc[0]}, model {part['model'].iloc[0]}"
        found += _tables(f"{name}-{metric}", what, columns, each=True)
    varied = [key for key in RUN if rows[key].nunique() > 1 or key == "protocol"]
    for _, run in rows.groupby(list(RUN), sort=True):
        if run["task"].nunique() == 1:
            continue
        about = run.iloc[0]
        tasks = [part for _, part in run.groupby(["task", "generate"], sort=True)]
        for budget in _budgets(run):
            parts = [part for part in (_at(part, budget) for part in tasks) if (part["budget"] == budget).any()]
            columns = [compared(str(part["task"].iloc[0]), part, read) for part in parts]
            what = f"by task at budget {budget}, protocol {about['protocol']}, model {about['model']}"
            name = "-".join(["tasks", *(slug(str(about[key])) for key in varied), slug(budget)])
            found += _tables(f"{name}-{metric}", what, columns, each=False)
    return found


def _rows(columns: Sequence[Column]) -> pd.DataFrame:
    return pd.DataFrame([row for column in columns for row in column.cells.values()])


def _budgets(rows: pd.DataFrame) -> list[str]:
    """Without the full cache's, which is none."""
    return sorted(rows.loc[rows["method_name"] != "full", "budget"].unique(), key=budget_order)


def _at(rows: pd.DataFrame, budget: str) -> pd.DataFrame:
    return rows[rows["budget"].eq(budget) | rows["method_name"].eq("full")]


def _tables(name: str, what: str, columns: Sequence[Column], each: bool) -> list[Table]:
    """As many tables as it takes for them to fit a page. `each`: bytes beside each column, else once, in the last."""
    most = 4 if each else 6
    blocks = []
    for some in (columns[i : i + most] for i in range(0, len(columns), most)):
        cells = _rows(some)
        order = cells.drop_duplicates("method").sort_values(["family", "method"])[["family", "method"]]
        parts = [order.iloc[i : i + LINES] for i in range(0, len(order), LINES)]
        blocks += [(some, part) for part in parts if finished(cells[cells["method"].isin(part["method"])]).any()]
    found = []
    for i, (some, rows) in enumerate(blocks):
        part = f" (part {i + 1} of {len(blocks)})" if len(blocks) > 1 else ""
        named = f"{name}-{i + 1}" if part else name
        found.append(Table(named, _table(named, what + part, some, rows, each)))
    return found


def _table(name: str, what: str, columns: Sequence[Column], order: pd.DataFrame, each: bool) -> str:
    cells = _rows(columns)
    cells = cells[cells["method"].isin(order["method"])]
    digits = _digits(cells)
    texts = short(list(order["method"]))
    word = WORDS[cells["metric"].iloc[0]]
    lines, spans = [], 2 if each else 1
    width = len(columns) * spans + (not each)
    if each:
        tops = [rf"\multicolumn{{2}}{{c}}{{{escape(column.title)}}}" for column in columns]
        rules = [rf"\cmidrule(lr){{{2 + 2 * i}-{3 + 2 * i}}}" for i in range(len(columns))]
        lines += [" & " + " & ".join(tops) + r" \\", " ".join(rules)]
        lines.append("method" + rf" & {word} & bytes, \%" * len(columns) + r" \\")
    else:
        lines.append(" & ".join(["method", *(escape(column.title) for column in columns), r"bytes, \%"]) + r" \\")
    lines.append(r"\midrule")
    if any(column.full is not None for column in columns):
        lines += [_full(columns, digits, each), r"\midrule"]
    families = order["family"].replace("", "other")
    for family, methods in order.groupby(families, sort=False)["method"]:
        if families.nunique() > 1:
            lines.append(rf"\multicolumn{{{1 + width}}}{{l}}{{\itshape {escape(str(family))}}} \\")
        for method in methods:
            row = [escape(texts[method])]
            for column in columns:
                row += [_value(column, method, digits), _share([column], method)][:spans]
            lines.append(" & ".join(row + ([] if each else [_share(columns, method)])) + r" \\")
    notes = _notes(cells, texts, missing=len(cells) < len(texts) * len(columns))
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table*}[tp]",
            r"\centering\footnotesize\setlength{\abovecaptionskip}{0pt}\setlength{\belowcaptionskip}{4pt}",
            rf"\caption{{{_caption(cells, columns, what)}}}",
            rf"\label{{tab:{name}}}",
            r"\setlength{\tabcolsep}{4pt}\renewcommand{\arraystretch}{1.3}",
            rf"\begin{{tabular}}{{l{'r' * width}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *([r"\par\smallskip", rf"\parbox{{\linewidth}}{{\scriptsize {notes}}}"] if notes else []),
            r"\end{table*}",
            "",
        ]
    )


def _digits(cells: pd.DataFrame) -> int:
    """Decimals that show the usual half-width of an interval with two digits."""
    half = ((cells["high"] - cells["low"]) / 2).median()
    return min(4, max(2, 1 - math.floor(math.log10(half)))) if half > 0 else 2


def _estimate(row: Row, digits: int, style: str = "{}") -> str:
    mean, low, high = (f"{row[name]:.{digits}f}" for name in ("mean", "low", "high"))
    ends = "" if math.isnan(row["low"]) else rf"$_{{{low}}}^{{{high}}}$"
    return style.format(mean) + ends


def _value(column: Column, method: str, digits: int) -> str:
    row = column.cells.get(method, {"status": "--"})
    if row["status"] != "done":
        return "inf." if row["status"] == "infeasible" else row["status"]
    if math.isnan(row["mean"]):
        return "--"
    bold, line = r"\textbf{{{}}}", r"\underline{{{}}}"
    return _estimate(row, digits, bold if method in column.best else line if method in column.near else "{}")


def _share(columns: Sequence[Column], method: str) -> str:
    """What was held, in % of the full cache; the mean over columns."""
    shares = [column.cells[method]["share"] for column in columns if method in column.cells]
    share = 100 * float(np.mean([one for one in shares if not math.isnan(one)] or [math.nan]))
    return "" if math.isnan(share) else f"{share:.{1 if share >= 1 else 2}f}"


def _full(columns: Sequence[Column], digits: int, each: bool) -> str:
    if each:  # the same cell in all columns
        full = columns[0].full
        assert full is not None
        return rf"full cache & \multicolumn{{{2 * len(columns)}}}{{c}}{{{_estimate(full, digits)}}} \\"
    texts = ["--" if column.full is None else _estimate(column.full, digits) for column in columns]
    return " & ".join(["full cache", *texts, "100"]) + r" \\"


def _caption(cells: pd.DataFrame, columns: Sequence[Column], what: str) -> str:
    done = cells[cells["mean"].notna()]
    metric, better = done["metric"].iloc[0], done["better"].iloc[0]
    made = ", ".join(MADE[name] for name in MADE if name in set(done["interval"]))
    full = _range(done["bytes_full"] / 1e6, 1)
    return (
        rf"{METRICS[metric]} ({better} is better) {escape(what)}: means over $n$~=~{_range(done['n'])} examples from "
        rf"{_range(done['clusters'])} documents, their 95\,\% interval as sub- and superscript ({made}). "
        rf"Bytes: measured, held for the context, in \% of the full cache's ({full}\,MB). "
        r"Bold: the best method; underlined: not to be told from it (the 95\,\% interval of the paired difference "
        r"contains 0; not corrected for the number of methods)."
    )


def _range(numbers: pd.Series, digits: int = 0) -> str:
    low, high = f"{numbers.min():.{digits}f}", f"{numbers.max():.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _notes(cells: pd.DataFrame, texts: Mapping[str, str], missing: bool) -> str:
    """What a reader has to know of single cells."""
    notes = [f"{escape(text)}: {escape(method)}." for method, text in texts.items() if text != method]
    if missing:
        notes.append("--: not run.")
    states = set(cells["status"])
    if "infeasible" in states:
        notes.append("inf.: the method has no plan within this budget.")
    if "failed" in states:
        notes.append("failed: ended with an error.")
    if "running" in states:
        notes.append("running: not finished.")
    fewer = cells[cells["mean"].notna() & (cells["n"] < cells.groupby("task")["n"].transform("max"))]
    if len(fewer):
        named = ", ".join(f"{escape(f'{row.method} at {row.budget}')} ({row.n})" for row in fewer.itertuples())
        notes.append(f"Fewer examples: {named}.")
    marks = cells["marks"].str.split("; ").explode().value_counts().drop(["", "few clusters"], errors="ignore")
    if len(marks):
        notes.append(
            "Marks: " + ", ".join(f"{escape(str(mark))} ({count} cells)" for mark, count in marks.items()) + "."
        )
    return " ".join(notes)


def write(found: Sequence[Table], out: Path) -> list[Path]:
    """A file for each table, to be \\input, and tables.tex, a document that has all of them."""
    inputs = [rf"\input{{{table.name}}}" for table in found]
    head = [r"\documentclass{article}", r"\usepackage[margin=2cm]{geometry}", r"\usepackage{booktabs}"]
    # \clearpage: LaTeX holds only so many floats back.
    document = [*head, r"\begin{document}", *(f"{line}\\clearpage" for line in inputs), r"\end{document}", ""]
    files = {f"{table.name}.tex": table.text for table in found} | {"tables.tex": "\n".join(document)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text, encoding="ascii")
    except OSError as error:
        raise UsageError(f"could not write {out}: {error.strerror}") from error
    return [out / name for name in files]
