"""Published checks: verdicts on frozen observations, the files in conf/published/, and what may be called published."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from report_data import write_results

from kvbench import fetch, plugins
from kvbench.config import convert
from kvbench.errors import UsageError
from kvbench.published import configurations, run_checks
from kvbench.report import published
from kvbench.report.published import FAIL, INCONCLUSIVE, PASS, Check, chosen, judge, load, observations, overall, proved
from kvbench.store import read_cell

ROOT = Path(__file__).parent.parent
CHECKS = load()

FILE = """
source: {what: a table, url: https://example.org, read_from: table, verified: true}
template: none
budget: nominal
metric: score
margin: 5
margin_why: room
gate_note: it is a gate
tiers: {quick: {limit: 2, gpu_minutes: 0}}
options: {model: smollm2-135m, task: niah, task.context: 256, task.max_new_tokens: 16}
cells: {full: {method: full}}
values: {full: 90}
"""


def table(right: int, of: int, strata: int = 1) -> pd.DataFrame:
    """Observations of which the first ones are 100 and the others 0."""
    value = np.where(np.arange(of) < right, 100.0, 0.0)
    names = [str(i) for i in range(of)]
    return pd.DataFrame(
        {"id": names, "value": value, "cluster": names, "stratum": [str(i % strata) for i in range(of)]}
    )


def check(tmp_path: Path, **changes: str) -> Check:
    """The check of FILE, with other lines."""
    lines = [line for line in FILE.strip().splitlines() if line.partition(":")[0] not in changes]
    (tmp_path / "one.yaml").write_text("\n".join(lines + [f"{key}: {text}" for key, text in changes.items()]))
    return load(tmp_path)["one"]


ORDER = {
    "values": "{}",
    "cells": "{a: {method: full}, b: {method: snapkv}, c: {method: keydiff}, d: {method: random}}",
    "orders": "[[a, [b, c], d]]",
    "gate_note": "no figure",
}


# -- verdicts --


def test_three_verdicts_on_a_value(tmp_path):
    one = check(tmp_path)
    for right, of, verdict in (
        (900, 1000, PASS),
        (800, 1000, FAIL),
        (94, 100, INCONCLUSIVE),
        (860, 1000, INCONCLUSIVE),
    ):
        (found,) = judge(one, {"full": table(right, of)})
        assert (found.verdict, found.n, found.claim) == (verdict, of, "full = 90")
        assert found.low <= found.mean <= found.high
        assert f"n = {of}" in found.why
        assert (found.needed is None) == (verdict != INCONCLUSIVE)
    assert found.verdict == INCONCLUSIVE
    assert f"n = {found.needed:,} would decide" in found.why


@pytest.mark.parametrize(("right", "decided"), [(86, PASS), (84, FAIL)])
def test_so_many_examples_would_decide(tmp_path, right, decided):
    """The estimate staying where it is, one past the number told decides; half of it does not."""
    one = check(tmp_path)
    (found,) = judge(one, {"full": table(right * 10, 1000)})
    assert found.verdict == INCONCLUSIVE
    for share, verdict in ((1.1, decided), (0.5, INCONCLUSIVE)):
        of = int(found.needed * share)
        assert judge(one, {"full": table(of * right // 100, of)})[0].verdict == verdict


def test_sets_count_alike_whatever_their_size(tmp_path):
    seen = table(0, 400)
    seen["stratum"] = ["large"] * 300 + ["small"] * 100
    seen["value"] = [100.0] * 299 + [0.0] * 100 + [100.0]
    (found,) = judge(check(tmp_path), {"full": seen})
    assert found.mean == pytest.approx((29900 / 300 + 100 / 100) / 2)


def test_the_gate_comes_first(tmp_path):
    (tmp_path / "full.yaml").write_text(FILE)
    one = check(tmp_path, gate="full", gate_note='""')
    seen = {"full": table(900, 1000)}
    for gate in (FAIL, INCONCLUSIVE, None):
        (found,) = judge(one, seen, gate)
        assert found.verdict == INCONCLUSIVE
        assert found.why == f"gate not passed: full is {gate or 'not run'}"
    assert judge(one, seen, PASS)[0].verdict == PASS
    assert list(load(tmp_path)) == ["full", "one"]


def test_an_order_is_of_neighbours_and_ties(tmp_path):
    one = check(tmp_path, **ORDER)
    assert one.relations == [("a", ">", "b"), ("a", ">", "c"), ("b", ">", "d"), ("c", ">", "d"), ("b", "~", "c")]
    seen = {"a": table(360, 400), "b": table(280, 400), "c": table(281, 400), "d": table(120, 400)}
    found = judge(one, seen)
    assert [finding.claim for finding in found] == ["a > b", "a > c", "b > d", "c > d", "b ~ c"]
    assert overall(found) == PASS

    reversed_ = judge(one, seen | {"d": table(380, 400)})
    assert [finding.verdict for finding in reversed_] == [PASS, PASS, FAIL, FAIL, PASS]
    assert overall(reversed_) == FAIL
    assert judge(one, seen | {"c": table(320, 400)})[-1].verdict == FAIL  # no tie
    near = judge(one, seen | {"a": table(282, 400)})
    assert [finding.verdict for finding in near[:2]] == [INCONCLUSIVE] * 2
    assert near[0].needed > 400
    assert overall(near) == INCONCLUSIVE


def test_pairs_are_of_the_same_examples(tmp_path):
    """Which is what makes small differences seen; other examples are refused."""
    one = check(tmp_path, **ORDER | {"orders": "[[a, b]]", "cells": "{a: {method: full}, b: {method: snapkv}}"})
    ours, theirs = table(520, 1000), table(500, 1000)
    assert judge(one, {"a": ours, "b": theirs})[0].verdict == PASS
    assert judge(one, {"a": ours, "b": theirs.sample(frac=1, random_state=0)})[0].verdict == PASS
    (found,) = judge(one, {"a": ours, "b": theirs.iloc[1:]})
    assert (found.verdict, found.why) == (INCONCLUSIVE, "the cells were not asked the same examples")


def test_what_is_not_there_is_named(tmp_path):
    (found,) = judge(check(tmp_path), {})
    assert (found.verdict, found.why) == (INCONCLUSIVE, "no records of full")


def test_from_a_results_folder(tmp_path):
    """Of three sub-tasks; only cells that are done, and of each so many of its first examples."""
    folders = write_results(tmp_path / "results", 60, tasks=("ruler",), protocols=("blind",), methods={"random": 0.5})
    seen = observations(folders[:1], "score", 30)
    _, records = read_cell(folders[0])
    assert list(seen["value"]) == [100 * record["score"] for record in records[:30]]
    assert set(seen["stratum"]) == {"niah_single_1", "qa_1", "vt"}
    one = check(tmp_path, **ORDER | {"orders": "[[a, b]]", "cells": "{a: {method: full}, b: {method: snapkv}}"})
    cells = {"a": observations(folders[:1], "score"), "b": observations(folders[1:2], "score")}
    findings = judge(one, cells)
    assert findings[0].verdict == PASS
    said = published.verdict(one, "quick", findings, folders[:2])
    assert (said["verdict"], said["claimed"]["orders"], len(said["cells"])) == (PASS, [["a", "b"]], 2)
    with pytest.raises(UsageError, match=r"failed|infeasible"):
        observations(folders[-1:], "score")


# -- files --


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"marign": "3"}, "marign"),
        ({"source": "{what: a, url: b, read_from: table, verified: true, page: 3}"}, "page"),
        ({"tiers": "{quick: {limit: 4, gpu_minutes: 1, hours: 2}}"}, "hours"),
        ({"tiers": "{slow: {limit: 4, gpu_minutes: 1}}"}, "unknown tier 'slow'"),
        ({"source": "{what: a, url: b, read_from: memory, verified: true}"}, "unknown read_from 'memory'"),
        ({"source": "{what: a, read_from: table, verified: true}"}, "url"),
        ({"values": "{fulll: 3}"}, "unknown cell 'fulll'; known: full"),
        ({"cells": "{full: {method: full}, other: {method: full}}"}, "nothing is said of cell other"),
        ({"orders": "[[full, full]]"}, "either values or orders"),
        ({"values": "{}"}, "either values or orders"),
        ({"gate": "nothing"}, "unknown gate of one 'nothing'"),
        ({"gate_note": '""'}, "name a gate, or say in gate_note why there is none"),
        ({"margin": "0"}, "the margin must be above 0"),
        ({"margin": "wide"}, "margin"),
        ({"metric": "scores"}, "unknown metric 'scores'; known: score, held_out_r2"),
    ],
)
def test_files_are_checked(tmp_path, changes, match):
    with pytest.raises(UsageError, match=match):
        check(tmp_path, **changes)


def test_gates_have_no_gate_and_the_same_tiers(tmp_path):
    (tmp_path / "full.yaml").write_text(FILE.replace("quick", "full"))
    with pytest.raises(UsageError, match="must be of the same tiers"):
        check(tmp_path, gate="full")
    (tmp_path / "full.yaml").write_text(FILE + "gate: two\n")
    (tmp_path / "two.yaml").write_text(FILE)
    with pytest.raises(UsageError, match="without a gate of its own"):
        check(tmp_path, gate="full")


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_is_cells_of_kvbench(name, tmp_path):
    """Composed as a run's; and a word that is not an option is refused."""
    found = CHECKS[name]
    digests = set()
    for cell in found.cells:
        for node in configurations(found, cell, tmp_path, 8):
            run = convert(node)
            digests.add(run.cell.digest)
            assert run.cell.model.revision
            assert (run.cell.budget.nominal or run.cell.budget.unit == "") == (found.budget == "nominal")
            assert run.settings.limit == 8
    assert len(digests) == len(found.cells) * len(found.repeats)
    with pytest.raises(UsageError, match="unknown option"):
        configurations(replace(found, options=found.options | {"task.contxt": 1}), next(iter(found.cells)), tmp_path, 8)


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_says_where_it_is_from(name):
    found = CHECKS[name]
    assert found.source.url.startswith("https://")
    assert found.margin_why
    assert found.template
    assert found.source.verified or found.source.note
    assert all(tier.gpu_minutes > 0 for tier in found.tiers.values())
    if found.proves:
        plugins.known("method", found.proves, plugins.files("methods"))
        assert found.values, "an order or a sign is no figure"
    if found.gate:
        gate = CHECKS[found.gate]
        assert {gate.model(cell) for cell in gate.cells} == {found.model(cell) for cell in found.cells}
        assert [options["method"] for options in gate.cells.values()] == ["full"]


def test_what_is_asked_for():
    assert set(chosen(CHECKS, [], "quick", "qwen3-8b")) == {"ruler4k_full_qwen3_8b", "ruler4k_knorm_qwen3_8b"}
    assert next(iter(chosen(CHECKS, ["ruler4k_knorm_qwen3_8b"], "quick", None))) == "ruler4k_full_qwen3_8b"
    assert list(chosen(CHECKS, [], "quick", "qwen3-0.6b")["vector_r2"].values) == ["qwen3-0.6b"]
    for asked, match in (
        (([], "quick", "gpt"), "unknown model 'gpt'; known: .*qwen3-8b"),
        ((["knorm"], "quick", None), "unknown check 'knorm'; known: "),
        (([], "quick", "mistral-7b-v0.2"), "no such check in tier quick"),
    ):
        with pytest.raises(UsageError, match=match):
            chosen(CHECKS, *asked)


def test_the_page_lists_every_check():
    page = (ROOT / "docs" / "published.md").read_text()
    listed = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(CHECKS)


def test_what_the_field_has_published_is_encoded():
    values = {name: found.values for name, found in CHECKS.items()}
    assert values["ruler4k_full_llama3.1_8b"] == {"full": 95.7}
    assert values["ruler4k_full_qwen3_8b"] == {"full": 95.3}
    assert list(values["ruler4k_knorm_qwen3_8b"].values()) == [87.2, 68.3, 32.6, 8.9]
    assert values["longbench_full_mistral_7b_v0.2"] == {"full": 43.54}
    assert values["longbench_kivi_mistral_7b_v0.2"] == {"bits2": 42.43, "bits4": 43.53}
    assert values["vector_r2"]["llama3.1-8b"] == 0.6964


# -- runs --


def test_without_a_gpu_each_check_is_skipped_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = chosen(CHECKS, [], "full", None)
    assert run_checks(asked, "full", tmp_path) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(asked) == len(CHECKS)
    assert all(line.startswith("SKIPPED ") for line in told)
    assert sum("no GPU" in line for line in told) + sum("its gate" in line for line in told) == len(told)
    assert not list(tmp_path.iterdir())


def test_without_the_hub_they_are_skipped_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("kvbench.hub.reachable", lambda url: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *path, **revision: None)
    assert run_checks(chosen(CHECKS, ["ruler4k_full_qwen3_8b"], "quick", None), "quick", tmp_path) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "no hub: Qwen/Qwen3-8B is not on this machine" in line


def test_a_gate_and_what_is_behind_it_on_the_embedded_model(tmp_path, capsys):
    """Missing cells are run, complete ones read; the verdict is kept; behind a failed gate nothing is run."""
    if not (fetch.cache_folder() / "models").exists():
        pytest.skip("the embedded model has not been fetched")
    (tmp_path / "full.yaml").write_text(FILE.replace("margin: 5", "margin: 89"))
    behind = FILE.replace("gate_note: it is a gate", "gate: full\nproves: random").replace("90", "20")
    (tmp_path / "random.yaml").write_text(behind.replace("{method: full}", "{method: random, budget: 0.05r}"))
    checks, results = load(tmp_path), tmp_path / "results"
    run_checks(checks, "quick", results)
    told = capsys.readouterr().out
    assert "full = 90" in told
    said = json.loads((results / "published" / "full.json").read_text())
    assert said["findings"][0]["n"] == 2
    assert len(said["cells"]) == len(said["commits"]) == 1
    if said["verdict"] == PASS:
        assert (results / "published" / "random.json").exists()
    folders = sorted(results.glob("*/*/*/examples.jsonl"))
    before = [folder.stat().st_mtime_ns for folder in folders]

    wrong = {"full": replace(checks["full"], values={"full": 0.001}, margin=0.001), "random": checks["random"]}
    assert run_checks(wrong, "quick", results) == 1
    told = capsys.readouterr().out
    assert "FAIL" in told
    assert "gate not passed: full is FAIL" in told
    assert [folder.stat().st_mtime_ns for folder in folders] == before
    assert proved(checks, results / "published") == {}


def test_held_out_r2_is_that_of_the_fits(tiny, own_cache, tmp_path, monkeypatch, capsys):
    """Each repeat is a fit; a cell that can't be had is told, and its claim is inconclusive."""
    monkeypatch.setattr("kvbench.published._loaded", lambda config: tiny)
    one = check(
        tmp_path,
        metric="held_out_r2:key.layer",
        margin="0.5",
        options="{model: smollm2-135m, task: niah, method: vector_paper, method.texts: [pydoc]}",
        repeats="[{method.calibration_tokens: 8192}, {method.calibration_tokens: 10240}]",
        cells="{here: {method.base: keydiff}, elsewhere: {method.base: keydiff, method.texts: [nowhere]}}",
        values="{here: 0.5, elsewhere: 0.5}",
    )
    run_checks({"one": one}, "quick", tmp_path / "results")
    told = capsys.readouterr().out
    assert "SKIPPED       one  elsewhere: nowhere is neither a text file" in told
    said = json.loads((tmp_path / "results" / "published" / "one.json").read_text())
    here, elsewhere = said["findings"]
    assert here["n"] == 2
    assert here["mean"] < 1
    assert elsewhere["why"] == "no records of elsewhere"


# -- trust --


def test_only_a_committed_pass_makes_a_method_published():
    proofs = proved(CHECKS, ROOT / "results" / "published")
    for name, file in plugins.files("methods").items():
        if plugins.about(file).traits.get("trust") == "published":
            assert name in proofs, f"{name} is called published, but no committed verdict says PASS (docs/published.md)"


def test_a_pass_counts_while_it_is_of_what_is_claimed(tmp_path):
    """By clean commits, and of the values, margins and cells that the check has today."""
    one = replace(check(tmp_path), proves="snapkv")
    said = published.verdict(one, "quick", judge(one, {"full": table(900, 1000)}), []) | {"commits": ["abc"]}
    folder = tmp_path / "published"
    folder.mkdir()

    def found(**changes: object) -> dict[str, list[str]]:
        (folder / "one.json").write_text(json.dumps(said | changes))
        return proved({"one": one}, folder)

    assert found() == {"snapkv": ["one"]}
    for changes in ({"dirty": True}, {"commits": []}, {"verdict": INCONCLUSIVE}):
        assert found(**changes) == {}
    assert found(claimed=said["claimed"] | {"margin": 50.0}) == {}
    (folder / "one.json").rename(folder / "own.json")
    assert proved({"one": one}, folder) == {}


def test_verdicts_need_no_torch():
    code = "import sys, kvbench.report.published as p; p.load(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_script_teaches():
    script = [sys.executable, "scripts/check_published.py"]
    told = subprocess.run([*script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make check-published TIER=quick MODEL=qwen3-8b" in told
    done = subprocess.run([*script, "nothing"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("kvbench: unknown check 'nothing'; known: ")
