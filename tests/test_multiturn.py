"""Sessions, and kv: full contexts, questions with one answer, conversations in order, rows of SCBench's format."""

import json
import re
import time
from itertools import islice

import pytest
from conftest import byte_tokenizer
from transformers import AutoTokenizer

from kvbench import plugins
from kvbench.config import build_plugin
from kvbench.errors import UsageError
from kvbench.fetch import embedded_model
from kvbench.prompt import Writer
from kvbench.task import Example

KV = plugins.load("tasks", "kv")
MultiTurn = plugins.load("tasks", "multiturn")
SETS = ["kv", "prefix_suffix", "vt", "many_shot", "mix", "vt+prefix_suffix"]


@pytest.fixture(scope="module", params=["bytes", "real"])
def writer(request):
    if request.param == "bytes":
        return Writer(byte_tokenizer())
    try:
        return Writer(AutoTokenizer.from_pretrained(embedded_model()))
    except UsageError as error:
        pytest.skip(str(error))


def some(writer, number, name="multiturn", seed=0, **options):
    return list(islice(build_plugin("tasks", name, options).contexts(writer, seed), number))


def lengths(writer, context):
    return [len(writer.prompt(context.ids, e.question, e.answer_prefix)) for e in context.examples if not e.follows]


def pairs(text):
    """The JSON object in a context."""
    return json.loads(text[text.index("{") : text.index("}") + 1])


@pytest.mark.parametrize("questions", [1, 5])
@pytest.mark.parametrize("short", [False, True])
def test_kv(writer, questions, short):
    for size in (1300, 2049):
        for context in some(writer, 2, "kv", context=size, questions=questions, short=short):
            found = pairs(writer.decode(context.ids))
            line = max(len(writer.encode(f' "{key}": "{value}",\n')) for key, value in found.items())
            assert size - line - 2 <= max(lengths(writer, context)) <= size
            assert writer.encode(writer.tokenizer.decode(context.ids)) == context.ids
            assert len({*found, *found.values()}) == 2 * len(found)
            assert all(len(text) == (8 if short else 36) for text in found)
            for example in context.examples:
                (key,) = re.findall(r'Key: "(.*)"', example.question)
                place = list(found).index(key)
                assert example.references == (found[key],)
                assert example.target == f' "{found[key]}"'
                assert example.answer_prefix == f'"{key}":'
                assert len(writer.encode(example.target)) < example.max_new_tokens
                assert example.info["depth"] == pytest.approx(place / (len(found) - 1), abs=1e-4)
            places = sorted(list(found.values()).index(example.references[0]) for example in context.examples)
            edges = [band * len(found) // questions for band in range(questions + 1)]
            assert all(edges[band] <= place < edges[band + 1] for band, place in enumerate(places))


def test_kv_depths_are_everywhere():
    writer = Writer(byte_tokenizer())
    depths = [context.examples[0].info["depth"] for context in some(writer, 100, "kv", short=True, context=1024)]
    assert min(sum(low <= depth < low + 0.25 for depth in depths) for low in (0, 0.25, 0.5)) > 10
    assert [context.examples[0].info["depth"] for context in some(writer, 5, "kv", short=True, context=1024)] == depths[
        :5
    ]


def test_kv_score():
    example = Example("x", "", references=("ab12",), target="")
    assert [KV().score(example, answer) for answer in (' "ab12"', "AB12", "ab1 2", "")] == [1, 0, 0, 0]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("mode", ["shared", "turns"])
def test_contexts_are_full_and_turns_in_order(writer, name, mode):
    for context in some(writer, 2, sets=[name], mode=mode, context=3000, turns=4):
        assert len(context.examples) == 4
        text = writer.decode(context.ids)
        assert writer.encode(writer.tokenizer.decode(context.ids)) == context.ids
        assert max(lengths(writer, context)) <= 3000
        if mode == "shared":  # the longest of the questions fills the prompt, but for a line of each part
            assert max(lengths(writer, context)) > 3000 - 100 * (1 + ("+" in name or name == "mix"))
        before = None
        for turn, example in enumerate(context.examples):
            assert example.id == f"{context.id}-{turn}"
            assert example.info["turn"] == turn
            assert example.info["set"] == name
            assert example.follows == (before if mode == "turns" else None)
            assert example.history == (example.target if mode == "turns" else None)
            assert example.question.startswith("\n\n") == (mode == "shared" or turn == 0)
            assert all(reference in text for reference in example.references)
            assert not any(reference in example.question for reference in example.references)
            assert len(writer.encode(example.target)) <= example.max_new_tokens
            before = example.id


def test_what_is_asked_has_one_answer(writer):
    (context,) = some(writer, 1, sets=["prefix_suffix"], context=4000)
    lines = writer.decode(context.ids).split("\n")[2:]
    assert {len(line) for line in lines} == {14}
    for example in context.examples:
        first, last = re.findall('"([a-z]{4})"', example.question)
        assert tuple(line for line in lines if line.startswith(first) and line.endswith(last)) == example.references

    (context,) = some(writer, 1, sets=["vt"], context=6000)
    values = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)\n?", writer.decode(context.ids)):
        values[name] = values.get(source, source)  # a chain's order is that of the text
    assert len(values) == 25
    for example in context.examples:
        (asked,) = re.findall(r"\d{5}", example.question)
        assert tuple(name for name, value in values.items() if value == asked) == example.references

    (context,) = some(writer, 1, sets=["many_shot"], context=6000)
    shots = re.findall(r"Phrase: (.*)\nLabel: (.*)", writer.decode(context.ids))
    labels = {phrase.split()[-1]: label for phrase, label in shots}
    assert len(set(labels.values())) == 8
    assert all(labels[phrase.split()[-1]] == label for phrase, label in shots)
    for example in context.examples:
        phrase = example.question.removeprefix("\n\nPhrase: ")
        assert phrase not in dict(shots)
        assert labels.get(phrase.split()[-1], *example.references) == example.references[0]


def test_a_mix_alternates(writer):
    (context,) = some(writer, 1, sets=["mix"])
    assert [example.info["part"] for example in context.examples] == ["kv", "many_shot"] * 2 + ["kv"]
    assert [example.answer_prefix == "Label:" for example in context.examples] == [False, True] * 2 + [False]
    first, second = writer.decode(context.ids).split("\n\nEach phrase")
    parts = [len(writer.encode(part)) for part in (first, second)]
    assert 0.6 < parts[0] / parts[1] < 1.2


def test_sets_take_turns_and_an_example_depends_on_seed_and_index_only(writer):
    many = some(writer, 7, context=1400)
    sets = [context.examples[0].info["set"] for context in many]
    assert sets == (["kv", "prefix_suffix", "vt", "many_shot", "mix"] * 3)[:7]
    assert some(Writer(writer.tokenizer), 4, context=1400) == many[:4]
    assert len({context.ids for context in many}) == len({context.id for context in many}) == 7
    other = some(writer, 7, seed=1, context=1400)
    assert not {context.ids for context in many} & {context.ids for context in other}
    (alone, _) = some(writer, 2, sets=["many_shot"], context=1400)
    assert alone == many[3]


def test_own_history(writer):
    (context,) = some(writer, 1, mode="turns", history="own", sets=["kv"])
    assert {example.history for example in context.examples} == {None}
    assert sum(example.follows is not None for example in context.examples) == 4


def test_score(writer):
    task = MultiTurn()
    for context in some(writer, 5):
        for example in context.examples:
            assert task.score(example, example.target.lower()) == 1
            assert task.score(example, "no idea") == task.score(example, "") == 0
            if example.info["set"] == "vt":
                assert task.score(example, example.references[0]) == pytest.approx(0.2)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    found = [
        {
            "id": f"session-{i}",
            "context": f"Book {i}. Blue whales {i}.",
            "multi_turns": [
                {"input": "Which whales?", "answer": ["Blue whales", "blue ones"]},
                {"input": "Which book?", "answer": f"Book {i}"},
                {"input": "What else?", "answer": "the sea"},
            ],
        }
        | ({"cluster_id": "sea"} if i > 3 else {})
        for i in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(file)


def test_rows(writer, rows):
    contexts = some(writer, 9, data=rows, sets=["qa"], mode="turns", turns=2)
    assert len(contexts) == 6
    assert sorted(c.id for c in contexts) == [f"multiturn-qa-{i:05d}" for i in range(6)]
    assert len({c.cluster_id for c in contexts}) == 5
    (context,) = (c for c in contexts if c.id == "multiturn-qa-00002")
    head = "Read the book and answer the question. Be very concise in your answer.\n\n"
    assert writer.decode(context.ids) == head + "Book 2. Blue whales 2."
    first, second = context.examples
    assert first.question == "\n\nQuestion: Which whales?\nAnswer:"
    assert second.question == "Question: Which book?\nAnswer:"
    assert (first.follows, second.follows) == (None, first.id)
    assert first.history == first.target == "Blue whales"
    assert first.references == ("Blue whales", "blue ones")
    assert first.max_new_tokens == 40
    assert first.info == {"set": "qa", "row": "session-2", "metric": "contains", "turn": 0}
    again = some(writer, 9, seed=1, data=rows, sets=["qa"], mode="turns", turns=2)
    assert sorted(again, key=lambda c: c.id) == sorted(contexts, key=lambda c: c.id)
    assert len(some(writer, 1, data=rows, sets=["qa"])[0].examples) == 3


@pytest.mark.parametrize(
    ("metric", "scores"),
    [("auto", [1, 1, 0]), ("contains", [1, 1, 0]), ("exact", [1, 0, 0]), ("share", [0.5, 0.5, 0]), ("f1", [1, 0.4, 0])],
)
def test_metrics_of_rows(writer, rows, metric, scores):
    options = {"data": rows, "sets": ["qa"], "metric": metric}
    (context,) = some(writer, 1, **options)
    task = build_plugin("tasks", "multiturn", options)
    answers = [" Blue whales\n", "They are many blue whales, so it says", "ships"]
    found = [task.score(context.examples[0], answer) for answer in answers]
    assert found == pytest.approx(scores, abs=0.01)


def test_data_hash_is_that_of_the_rows(rows):
    assert MultiTurn(data=rows, sets=("qa",)).data_hash() == MultiTurn(data=rows, sets=("kv",)).data_hash() != ""
    assert MultiTurn().data_hash() == ""


@pytest.mark.parametrize(
    "options",
    [
        {"turns": 0},
        {"sets": []},
        {"sets": ["nothing"]},
        {"sets": ["qa"]},
        {"sets": ["mix"], "turns": 1},
        {"history": "own"},
        {"metric": "f1"},
        {"data": "x.jsonl"},
        {"data": "x.jsonl", "sets": ["mix"]},
    ],
    ids=str,
)
def test_impossible_options(options):
    with pytest.raises(UsageError):
        build_plugin("tasks", "multiturn", options)


def test_impossible_lengths_and_data(writer, tmp_path):
    for name in SETS:
        with pytest.raises(UsageError, match=r"tokens too short .* task\.context"):
            some(writer, 1, sets=[name], context=60)
    with pytest.raises(UsageError, match=r"task\.context"):
        some(writer, 1, "kv", context=60)
    with pytest.raises(UsageError):
        KV(questions=0)
    file = tmp_path / "rows.jsonl"
    for row in ({"context": "x"}, {"context": "x", "multi_turns": [{"input": "x"}]}):
        file.write_text(json.dumps(row))
        with pytest.raises(UsageError):
            some(writer, 1, data=str(file), sets=["qa"])


def test_contexts_are_made_quickly(writer):
    start = time.perf_counter()
    some(writer, 10, context=8192)
    assert time.perf_counter() - start < 5
