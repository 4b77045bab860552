"""Tables say what the tidy table says, and compile, whatever cells are called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_data import HOSTILE, Drawn, write_cell, write_results

from kvbench.errors import UsageError
from kvbench.report.aggregate import aggregate
from kvbench.report.best import alike
from kvbench.report.latex import escape, tables, write

ALPHABET = "".join(map(chr, range(32, 127))) + "…éÅçžñüß中→ж😀\n\t\x00\x7f\u200b"
NEEDS_LATEX = pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="no pdflatex (Debian: texlive-latex-base, texlive-latex-recommended)"
)


def compiled(document: Path) -> str:
    """Runs LaTeX, twice for references; returns its log."""
    for _ in range(2):
        run = subprocess.run(
            ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", document.name],
            cwd=document.parent,
            capture_output=True,
            text=True,
            errors="replace",
        )
        assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout


@given(st.text(max_size=40))
@example(HOSTILE)
def test_escaped_text_is_ascii_and_balanced(text: str) -> None:
    found = escape(text)
    assert found.isascii()
    assert found.isprintable()
    bare = found.replace(r"\{", "").replace(r"\}", "")
    depth = np.cumsum([(c == "{") - (c == "}") for c in bare] or [0])
    assert depth.min() >= 0
    assert depth[-1] == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a_b & 50% #1", r"a\_b \& 50\% \#1"),
        ("--x ''", "{-}-x {'}'"),
        ("[exact,int4]", "{[}exact,int4{]}"),
        ("Müller\nž", r"M\"{u}ller \v{z}"),
        ("中", r"{\ttfamily U+4E2D}"),
        ("\\~^", r"\textbackslash{}\textasciitilde{}\textasciicircum{}"),
    ],
)
def test_escaping(text: str, wanted: str) -> None:
    assert escape(text) == wanted


@NEEDS_LATEX
@settings(max_examples=1, deadline=None)
@given(st.lists(st.text(st.sampled_from(ALPHABET), max_size=30), min_size=60, max_size=60))
def test_any_text_compiles(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """In cells, where a row opens, and in captions. Every single character, and each pair of punctuation, is in it."""
    marks = [c for c in ALPHABET if not c.isalnum()]
    names = [HOSTILE, ALPHABET, *ALPHABET, *("".join(a + b for b in marks) for a in marks), *names]
    rows = "".join(f"{escape(name[i : i + 60])} & 1 \\\\\n" for name in names for i in range(0, len(name), 60))
    folder = tmp_path_factory.mktemp("latex")
    blocks = [rows.splitlines(keepends=True)[i : i + 30] for i in range(0, len(rows.splitlines()), 30)]
    body = "".join(rf"\noindent\begin{{tabular}}{{ll}} {''.join(block)} \end{{tabular}}\clearpage" for block in blocks)
    caption = rf"\begin{{table}}\caption{{{escape(ALPHABET)}}}\end{{table}}"
    text = rf"\documentclass{{article}}\begin{{document}}{body}{caption}\end{{document}}"
    (folder / "any.tex").write_text(text, encoding="ascii")
    compiled(folder / "any.tex")


@NEEDS_LATEX
def test_tables_of_a_results_folder_compile(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_results(results, n=12, protocols=("blind",))
    hostile = Drawn("niah", 12, 8, 0)
    write_cell(results, hostile, "[weird]_method(name={}%$#&~^\\,x='--')", "0.1", 0.3)
    write_cell(results, hostile, "*star", "0.1", 0.3)
    found = tables(aggregate(results), results)
    files = write(found, tmp_path / "out")
    assert [file.name for file in files] == [
        *("niah-blind-score-1.tex", "niah-blind-score-2.tex", "ruler-blind-score.tex"),
        *("tasks-blind-0.05-score.tex", "tasks-blind-0.1-score.tex", "tasks-blind-0.5-score.tex", "tables.tex"),
    ]
    log = compiled(tmp_path / "out" / "tables.tex")
    assert "Overfull" not in log
    assert "Warning" not in log
    assert (tmp_path / "out" / "tables.pdf").exists()


def lines(text: str) -> dict[str, list[str]]:
    """Rows of a table's body by their first entry."""
    rows = [
        line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r" \\") and " & " in line
    ]
    return {row[0]: row[1:] for row in rows}


def test_a_table_says_what_the_tidy_table_says(tmp_path: Path) -> None:
    methods = {"good": 0.0, "same": 0.0, "poor": 0.6}
    what = {"tasks": ("niah",), "protocols": ("aware",), "budgets": ("0.1", "0.5")}
    write_results(tmp_path, methods=methods, clusters=40, unfinished=False, **what)
    tidy = aggregate(tmp_path)
    (table,) = tables(tidy, tmp_path)
    rows = lines(table.text)
    tidy = tidy[tidy["metric"] == "score"].set_index(["method", "budget"])
    best = tidy.loc[[("good", "0.1"), ("same", "0.1")], "mean"].idxmax()[0]
    other = {"good": "same", "same": "good"}[best]
    for name, style in ((best, r"\textbf{{{}}}"), (other, r"\underline{{{}}}"), ("poor", "{}")):
        row = tidy.loc[(name, "0.1")]
        if name == other and row["mean"] == tidy.loc[(best, "0.1"), "mean"]:
            style = r"\textbf{{{}}}"
        mean, low, high = (f"{row[key]:.2f}" for key in ("mean", "low", "high"))
        assert rows[name][:2] == [style.format(mean) + f"$_{{{low}}}^{{{high}}}$", "9.9"]
    assert rows["poor"][3] == "49.5"
    assert [line for line in table.text.splitlines() if line.startswith("full cache")]
    for said in ("Score (higher is better) on niah, protocol aware, model smollm2-135m-q4\\_1",):
        assert said in table.text
    assert "$n$~=~40 examples from 40 documents" in table.text
    assert "(bootstrap of documents)" in table.text
    assert "in \\% of the full cache's (46.3\\,MB)" in table.text


def test_cells_that_did_not_end_are_named(tmp_path: Path) -> None:
    write_results(tmp_path, n=8, tasks=("niah",), protocols=("blind",), budgets=("0.1",))
    (table,) = tables(aggregate(tmp_path), tmp_path)
    assert lines(table.text)["random"][:4] == ["inf.", "", "failed", ""]
    assert lines(table.text)["snapkv"][:4] == ["--", "", "--", ""]
    assert "--: not run. inf.: the method has no plan within this budget. failed: ended with an error." in table.text


def test_fewer_examples_and_marks_are_noted(tmp_path: Path) -> None:
    drawn = Drawn("niah", 20, 20, 0)
    write_cell(tmp_path, drawn, "full", "1", 0.0)
    write_cell(tmp_path, drawn, "snapkv", "0.1", 0.1, segment={"dirty": True})
    write_cell(tmp_path, drawn, "h2o", "0.1", 0.1, keep=7)
    (table,) = tables(aggregate(tmp_path), tmp_path)
    assert "$n$~=~7 to 20 examples" in table.text
    assert "Fewer examples: h2o at 0.1 (7)." in table.text
    assert "dirty commit (1 cells)" in table.text


def test_alike_is_a_paired_question() -> None:
    """Examples differ much more than methods do: the paired difference sees what the intervals of the two do not."""
    rng = np.random.default_rng(0)
    hard = rng.random(60)
    ids = pd.Index([str(i) for i in range(60)], name="id")
    theirs = pd.DataFrame({"value": hard, "cluster": ids, "sub_task": ""}, index=ids)
    worse = theirs.assign(value=hard - 0.05 + 0.01 * rng.standard_normal(60))
    noise = theirs.assign(value=hard + 0.1 * rng.standard_normal(60))
    cells = {"worse": worse, "noise": noise, "other order": worse.iloc[::-1], "fewer": noise.iloc[:40]}
    assert alike(cells, theirs, 1.0) == {"noise", "fewer"}
    one = theirs.assign(cluster="one")  # of one document nothing can be said
    assert alike(cells | {"others": worse.rename(index="x{}".format)}, one, 1.0) == set(cells)


def test_long_tables_go_on(tmp_path: Path) -> None:
    drawn = Drawn("niah", 8, 8, 0)
    for i in range(40):
        for budget in ("0.1", "0.2", "0.3", "0.4", "0.5") if i == 0 else ("0.1",):
            write_cell(tmp_path, drawn, f"m{i:02}", budget, 0.1, solo=False)
    found = tables(aggregate(tmp_path, baseline="m00"), tmp_path)
    assert [table.name for table in found] == [f"niah-blind-score-{i}" for i in (1, 2, 3)]
    assert "(part 2 of 3)" in found[1].text
    assert list(lines(found[1].text))[-1] == "m39"
    assert list(lines(found[2].text))[-1] == "m00"  # the one method that has a fifth budget


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write_results(tmp_path, n=4, tasks=("lm",), protocols=("blind",), unfinished=False)
    with pytest.raises(UsageError, match="no cell has score"):
        tables(aggregate(tmp_path), tmp_path)
    with pytest.raises(UsageError, match="unknown metric 'nll'; known: score"):
        tables(aggregate(tmp_path), tmp_path, "nll")


def test_the_script(tmp_path: Path) -> None:
    write_results(tmp_path / "results", n=6, tasks=("lm",), protocols=("blind",), budgets=("0.1",), unfinished=False)
    script = [sys.executable, "scripts/latex_tables.py", str(tmp_path / "results"), "--out", str(tmp_path / "tables")]
    run = subprocess.run([*script, "--metric", "kl_full"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(tmp_path / "tables" / f"{name}.tex") for name in ("lm-blind-kl_full", "tables")]
    run = subprocess.run(script, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "latex_tables: no cell has score\n")
