"""LongBench: metrics by hand and against the authors' package, prompts, splits, cuts, targets, the hub's form.

KVBENCH_TEST_LONGBENCH: a folder with LongBench's <set>.jsonl, or rows in that form.
"""

import hashlib
import json
import os
import random
import sys
from itertools import islice
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from kvbench import hub, plugins
from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Example
from kvbench.toolbox import answers

LongBench = plugins.load("tasks", "longbench")
MODULE = sys.modules[LongBench.__module__]
SETS = MODULE._SETS
PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
FEW_SHOT = {
    "trec": ("Question: Who?\nType: Individual\nQuestion: What?\nType: Thing", "Question: Where?\nType:", " "),
    "triviaqa": ("Passage:\nP\nQuestion:\nQ\nAnswer:\nyes", "Passage:\nR\nQuestion:\nS\nAnswer:", "\n"),
    "samsum": ("Dialogue: A: Hi\nSummary: Greeting.", "Dialogue: B: Bye\nSummary: ", ""),
    "lsht": ("新闻内容：甲\n类别：体育", "新闻内容：乙\n类别：", ""),
}


# Metrics


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The  cat, sat!", "a cat sat", 1.0),
        ("cat", "the black cat", 2 * (1 / 1) * (1 / 2) / (1 + 1 / 2)),
        ("cat cat dog", "cat dog dog", 2 / 3),
        ("theatre", "the atre", 0.0),  # articles are words
        ("state-of-the-art", "stateoftheart", 1.0),
        ("", "cat", 0.0),
        ("the", "the", 0.0),  # nothing is left
    ],
)
def test_qa_f1(answer, reference, expected):
    assert answers.qa_f1(answer, reference) == pytest.approx(expected)


def test_qa_f1_zh():
    pytest.importorskip("jieba", reason="pip install kvbench[zh]")
    # 论坛/的/主题 against 论坛/主题: 2 of 3 and 2 of 2
    assert answers.segmenter()("论坛的主题。") == ["论坛", "的", "主题", "。"]
    assert answers.qa_f1_zh("论坛的主题。", "「论坛」 主题") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert answers.qa_f1_zh("论坛", "《论坛》") == pytest.approx(2 / 3)  # 《 is a word, as there; 》 is none
    assert answers.qa_f1_zh("。", "论坛") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "precision", "recall"),
    [
        ("a b c d", "a c d e", 3 / 4, 3 / 4),
        ("a b. c d", "c d. a b", 1, 1),  # sentences are matched one by one
        ("c d a b", "a b c d", 2 / 4, 2 / 4),
        ("a a a b", "a b", 1, 1),  # distinct words
        ("a b c", "b a c", 2 / 3, 2 / 3),  # one of two
        ("x", "y", 0, 0),
        ("a.\n", "a", 1 / 2, 1),  # what follows the last full stop is a sentence, of one empty word
    ],
)
def test_rouge_l(answer, reference, precision, recall):
    expected = 2 * precision * recall / (precision + recall + 1e-8)
    assert answers.rouge_l(answer, reference) == pytest.approx(expected, abs=1e-12)
    for nothing in ("", "..."):
        assert answers.rouge_l(nothing, reference) == answers.rouge_l(reference, nothing) == 0


def test_rouge_l_is_that_of_the_authors_package():
    rouge = pytest.importorskip("rouge", reason="pip install kvbench[dev]").Rouge(metrics=["rouge-l"])
    draw = random.Random(0)
    for _ in range(400):
        one, other = (
            "".join(
                draw.choice(["a ", "b ", "c ", "dog ", "\n", ". ", ".", "  "]) for _ in range(draw.randrange(1, 40))
            )
            for _ in range(2)
        )
        try:
            (scores,) = rouge.get_scores([one], [other])
            expected = scores["rouge-l"]["f"]
        except ValueError:  # nothing but full stops
            expected = 0.0
        assert answers.rouge_l(one, other) == pytest.approx(expected, abs=1e-12), (one, other)


def test_rouge_l_of_long_sentences_is_scored():
    words = [str(i) for i in range(1200)]
    assert answers.rouge_l(" ".join(words), " ".join(words[:600])) == pytest.approx(2 / 3)


def test_rouge_l_zh():
    pytest.importorskip("jieba", reason="pip install kvbench[zh]")
    assert answers.rouge_l_zh("论坛的主题", "论坛主题") == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paragraph 7", "Paragraph 7", 1.0),
        ("It is 7, not 17 or 70.", "Paragraph 7", 1 / 3),
        ("段落7", "段落7", 1.0),
        ("7 7 8", "7", 2 / 3),
        ("seven", "7", 0.0),
    ],
)
def test_number_share(answer, reference, expected):
    assert answers.number_share(answer, reference) == pytest.approx(expected)


def test_classification():
    classes = ["City", "Other city", "Country", "it", "y"]
    assert answers.classification("It's a Country.", "Country", classes[:3]) == 1
    assert answers.classification("City or Country", "Country", classes[:3]) == 1 / 2
    assert answers.classification("Other city", "Other city", ["city", *classes[:3]]) == 1  # part of the right one
    assert answers.classification("City", "Country", classes[:3]) == 0
    # The authors' loop removes "it" and then skips "y": 1/2 and not 1.
    assert answers.classification("City", "City", ["it", "y", "City"]) == 1 / 2


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("return x", "return x", 1.0),
        ("\n\n# why\nreturn x\nmore", "return x", 1.0),
        ("`a`\n// b", "return x", 0.0),  # no line is left
        ("", "return x", 0.0),
        ("abcd", "bcde", 0.75),
        ("abc", "abd", 0.67),  # 2 * 2 / 6, in whole percent
    ],
)
def test_edit_similarity(answer, reference, expected):
    assert answers.edit_similarity(answer, reference) == expected


def test_chinese_needs_jieba(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jieba", None)
    answers.segmenter.cache_clear()
    with pytest.raises(UsageError, match=r"pip install kvbench\[zh\]"):
        LongBench(sets=("dureader",), data=str(tmp_path)).contexts(writer_of_bytes(), 0)
    answers.segmenter.cache_clear()


# Rows and prompts


def writer_of_bytes():
    return Writer(byte_tokenizer())


def row(name, number=0, context=None, **changes):
    shots, asked, _ = FEW_SHOT.get(name, (f"Text {number} of {name} {{input}}.\n", f"What is {number}?", ""))
    return {
        "input": "" if "{input}" not in SETS[name]["prompt"] else asked,
        "context": context or shots,
        "answers": [f"Paragraph {number}", "other 5"],
        "length": 4,
        "dataset": name,
        "language": "en",
        "all_classes": ["Paragraph 0", "Thing"] if name in ("trec", "lsht") else None,
        "_id": f"id{number}",
    } | changes


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    """A folder with three rows of each set."""
    for name in SETS:
        write(tmp_path, name, [row(name, i) for i in range(3)])
    return tmp_path


def drawn(data, sets, seed=0, number=None, **options):
    return list(islice(LongBench(sets=sets, data=str(data), **options).contexts(writer_of_bytes(), seed), number))


def parts(writer, context):
    example = context.examples[0]
    return writer.prompt(context.ids, example.question, example.answer_prefix, context.chat)


def text_of(ids):
    return byte_tokenizer().decode(ids, skip_special_tokens=False)


def test_prompts_are_the_benchmarks():
    """LongBench/config/dataset2prompt.json and dataset2maxlen.json of THUDM/LongBench@2e00731, by hash."""
    prompts = {name: facts["prompt"] for name, facts in SETS.items()}
    lengths = {name: facts["max_new_tokens"] for name, facts in SETS.items()}
    assert len(prompts) == 21
    assert hashlib.sha256(json.dumps([prompts, lengths], sort_keys=True).encode()).hexdigest() == PROMPTS_HASH
    for prompt in prompts.values():
        head, _, after = prompt.partition("{context}")
        assert after
        assert "{input}" not in head
        assert after.count("{input}") <= 1


PROMPTS_HASH = "0ea27b582687d50b5f685a70f57d43930743b17e8ad60852bd0d5680b237df8c"


@pytest.mark.parametrize("name", SETS)
def test_a_prompt_whole_and_in_its_parts(data, name):
    writer = writer_of_bytes()
    if SETS[name]["metric"].endswith("_zh"):
        pytest.importorskip("jieba", reason="pip install kvbench[zh]")
    for context in drawn(data, (name,)):
        given = row(name, int(context.id[-1]))
        example = context.examples[0]
        expected = SETS[name]["prompt"].replace("{input}", given["input"]).replace("{context}", given["context"])
        prompt = parts(writer, context)
        text = text_of(prompt.context + prompt.question + prompt.tail)
        assert context.chat is (name not in PLAIN)
        assert text == (f"<s><u>{expected}</u><a>" if context.chat else expected)
        assert text_of(prompt.context).endswith(given["context"])
        assert context.id == example.id == f"{name}-{given['_id']}"
        assert example.references == tuple(given["answers"])
        assert example.target == FEW_SHOT.get(name, ("", "", ""))[2] + given["answers"][0]
        assert example.max_new_tokens == SETS[name]["max_new_tokens"]
        assert example.info["cut"] == 0
        assert example.answer_prefix == ""


def test_sets_take_turns_in_an_order_of_the_seed(data):
    write(data, "lcc", [row("lcc", i) for i in range(5)])
    sets = ("qasper", "lcc", "trec")
    ids = [context.id for context in drawn(data, sets)]
    assert len(ids) == len(set(ids)) == 11
    assert [name.partition("-")[0] for name in ids] == ["qasper", "lcc", "trec"] * 3 + ["lcc", "lcc"]
    assert [context.id for context in drawn(data, sets, number=4)] == ids[:4]
    assert ids != [context.id for context in drawn(data, sets, seed=1)]
    assert sorted(ids) == sorted(context.id for context in drawn(data, sets, seed=1))
    # A set's order is the same in every company.
    assert [context.id for context in drawn(data, ("lcc",))] == [name for name in ids if name.startswith("lcc")]


def test_groups_and_unknown_sets():
    assert len(LongBench()._names()) == 16
    assert LongBench(sets=("zh",))._names() == (
        "multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh",
    )  # fmt: skip
    assert set(LongBench(sets=("all", "lcc"))._names()) == set(SETS)
    with pytest.raises(UsageError, match=r"unknown set 'gsm8k'; known: narrativeqa, qasper, .*, all, en, zh"):
        LongBench(sets=("gsm8k",))
    with pytest.raises(UsageError, match=r"task.sets=\[\]"):
        LongBench(sets=())
    with pytest.raises(UsageError, match=r"task.context=-1"):
        LongBench(context=-1)


def test_same_text_same_cluster(data):
    write(data, "qasper", [row("qasper", i, context="one" if i < 2 else "two") for i in range(3)])
    clusters = {context.id: context.cluster_id for context in drawn(data, ("qasper",))}
    assert clusters["qasper-id0"] == clusters["qasper-id1"] != clusters["qasper-id2"]


@pytest.mark.parametrize("name", ["hotpotqa", "trec", "repobench-p"])
@pytest.mark.parametrize("length", [700, 701])
def test_a_long_prompt_loses_its_middle(data, name, length):
    shots = "".join(f"Line {i:04d}\n" for i in range(500))
    write(data, name, [row(name, context=shots)])
    (context,) = drawn(data, (name,), context=length)
    prompt = parts(writer_of_bytes(), context)
    assert len(prompt) == length
    whole = SETS[name]["prompt"].replace("{input}", row(name)["input"]).replace("{context}", shots)
    text = text_of(prompt.context + prompt.question + prompt.tail)
    text = text.removeprefix("<s><u>").removesuffix("</u><a>")
    half = len(text) // 2
    assert text == whole[:half] + whole[len(whole) - (len(text) - half) :]
    assert context.examples[0].info["cut"] == len(whole) - len(text)
    # One that fits is whole.
    assert drawn(data, (name,), context=7000)[0].examples[0].info["cut"] == 0


def test_a_long_question_loses_its_beginning(data):
    write(
        data,
        "repobench-p",
        [row("repobench-p", context="c" * 600, input="i" * 900), row("repobench-p", 1, "x", input="i" * 900)],
    )
    for context in drawn(data, ("repobench-p",), context=400):
        prompt = parts(writer_of_bytes(), context)
        text = text_of(prompt.context + prompt.question + prompt.tail)
        assert len(prompt) == len(text) == 400
        assert text.startswith(SETS["repobench-p"]["prompt"].partition("{")[0])
        assert text.endswith("iNext line of code:\n")
        assert text[200:].count("i") == 180 or "x" in text


def test_context_zero_is_what_the_model_reads(data):
    writer = writer_of_bytes()
    write(data, "hotpotqa", [row("hotpotqa", context="long " * 400)])
    task = LongBench(sets=("hotpotqa",), data=str(data))
    (context,) = task.contexts(writer, 0)
    assert context.examples[0].info["cut"] == 0  # no limit is known
    writer.tokenizer.model_max_length = 1000
    (context,) = task.contexts(writer, 0)
    assert len(parts(writer, context)) == 1000 - context.examples[0].max_new_tokens


def test_refusals(data, tmp_path):
    with pytest.raises(UsageError, match=r"task.context=60 is too short: use \d+ or more"):
        drawn(data, ("qasper",), context=60)
    (data / "qasper.jsonl").unlink()
    with pytest.raises(UsageError, match=r"has no qasper\.jsonl: name LongBench's folder, or choose task\.sets"):
        LongBench(sets=("lcc", "qasper"), data=str(data)).contexts(writer_of_bytes(), 0)


def test_hash_is_of_the_files_used(data):
    def digest(*sets):
        return LongBench(sets=sets, data=str(data)).data_hash()

    before = digest("qasper", "lcc"), digest("qasper")
    assert len({*before}) == 2
    write(data, "lcc", [row("lcc", 7)])
    assert digest("qasper", "lcc") != before[0]
    assert digest("qasper") == before[1]


def as_kvpress_has_it(name, given):
    """The form of the hub's parquet copy: where its split falls is not ours, and samsum keeps its cue twice."""
    head, _, after = SETS[name]["prompt"].partition("{context}")
    filled = after.replace("{input}", given["input"])
    cue = next(
        (
            c
            for c in ("Answer:", "Summary:", "Type:", "回答：", "会议总结：", "答案是：")
            if filled.rstrip().endswith(c)
        ),
        "",
    )
    cue = cue or next(
        (c for c in ("The final answer is: ", "The answer is: ", "Next line of code:\n") if filled.endswith(c)), ""
    )
    mark = {"Question: ": 1, "Query: ": 1, "问题：": 1, "Now, write": 1, "Please enter": 1}
    starts = [filled.find(m) for m in mark if m in filled and name not in FEW_SHOT]
    place = min(starts) if starts else len(filled.partition(given["input"])[0]) if given["input"] else filled.find(cue)
    if name.startswith("passage_retrieval"):
        place = filled.find(given["input"])
    question = filled[place:]
    kept = {k: v for k, v in given.items() if k != "input"}
    return kept | {
        "context": head + given["context"] + filled[:place],
        "question": question if name == "samsum" else question.removesuffix(cue),
        "answer_prefix": cue,
        "task": name,
        "max_new_tokens": "52",
    }


@pytest.mark.parametrize("name", SETS)
def test_the_hubs_form_is_read_as_the_authors(name):
    given = row(name)
    stored = as_kvpress_has_it(name, given)
    assert stored["context"] != given["context"]
    read = MODULE._published(stored, name)
    assert {key: read[key] for key in given} == given


def test_an_unknown_form_is_refused():
    stored = as_kvpress_has_it("qasper", row("qasper")) | {"question": "Frage: Was?\n\n"}
    with pytest.raises(UsageError, match=r"take LongBench's \.jsonl files"):
        MODULE._published(stored, "qasper")


def example_of(name, references, **info):
    return Example("x", "?", references, references[0], info={"set": name} | info)


@pytest.mark.parametrize(
    ("name", "references", "answer", "expected"),
    [
        ("qasper", ("no", "the cat"), "Cat.", 1.0),
        ("triviaqa", ("yes",), "\n\nyes\nQuestion: no no", 1.0),
        ("hotpotqa", ("yes",), "yes\nno", 2 / 3),  # not only the first line
        ("samsum", ("They meet",), "They meet\nDialogue: more", 1.0),
        ("gov_report", ("They meet",), "They meet\nDialogue: more", 2 / 3),
        ("passage_count", ("12",), "12", 1.0),
        ("passage_retrieval_en", ("Paragraph 7",), "Paragraph 7 and Paragraph 8", 0.5),
        ("lcc", ("    return x",), "    return x\n    y = 2", 1.0),
        ("trec", ("City",), "City\nType: Thing", 1.0),
    ],
)
def test_scores(name, references, answer, expected):
    info = {"classes": ["City", "Thing"]} if name == "trec" else {}
    assert LongBench().score(example_of(name, references, **info), answer) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", SETS)
def test_a_reference_scores_one(data, name):
    if SETS[name]["metric"].endswith("_zh"):
        pytest.importorskip("jieba", reason="pip install kvbench[zh]")
    for context in drawn(data, (name,), number=1):
        example = context.examples[0]
        for reference in example.references[: 1 if name in ("trec", "lsht") else None]:
            expected = pytest.approx(1, abs=1e-7)
            if name in ("trec", "lsht") and reference not in example.info["classes"]:
                expected = 0
            assert LongBench().score(example, reference) == expected


# Real rows


def real_sets():
    folder = os.environ.get("KVBENCH_TEST_LONGBENCH", "")
    return [name for name in SETS if folder and Path(folder, f"{name}.jsonl").exists()]


@pytest.mark.skipif(not real_sets(), reason="KVBENCH_TEST_LONGBENCH names no folder with LongBench's rows")
def test_real_rows():
    folder, writer = os.environ["KVBENCH_TEST_LONGBENCH"], writer_of_bytes()
    for name in real_sets():
        if SETS[name]["metric"].endswith("_zh"):
            pytest.importorskip("jieba", reason="pip install kvbench[zh]")
        task = LongBench(sets=(name,), data=folder, context=4000)
        rows = {f"{name}-{r['_id']}": r for r in hub.rows(str(Path(folder, f"{name}.jsonl")))}
        contexts = list(task.contexts(writer, 0))
        assert {context.id for context in contexts} == set(rows)
        for context in contexts[:4]:
            (example,) = context.examples
            given, prompt = rows[context.id], parts(writer, context)
            assert len(prompt) <= 4000
            assert example.target.endswith(given["answers"][0])
            assert task.score(example, given["answers"][0]) == pytest.approx(1, abs=1e-7)
            assert task.score(example, "") == 0
            stored = as_kvpress_has_it(name, given)
            assert MODULE._published(stored, name)["context"] == given["context"]
            assert MODULE._published(stored, name)["input"] == given["input"]
        assert len({context.cluster_id for context in contexts}) == len({r["context"] for r in rows.values()})
