"""GSM8K: the usual eight examples, the reference as the examples are written, lm-eval's two ways to find the number."""

import json
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from kvbench import plugins
from kvbench.config import build_plugin
from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Example

GSM8K = plugins.load("tasks", "gsm8k")
ROWS = [
    {
        "question": "Ann has 2 boxes of 600 nails. How many nails?",
        "answer": "Ann has 2 * 600 = <<2*600=1200>>1200 nails.\nThat is all.\n#### 1,200",
        "index": 4,
    },
    {"question": "And one more?", "answer": "It is <<1+1=2>>2.\n#### 2", "index": 7},
    {"question": "And minus that?", "answer": "It is -2.\n#### -2", "index": 9},
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture(scope="module")
def writer():
    return Writer(byte_tokenizer())


def test_prompt_and_reference(data, writer):
    contexts = {context.id: context for context in GSM8K(data=data).contexts(writer, 0)}
    assert sorted(contexts) == ["gsm8k-00004", "gsm8k-00007", "gsm8k-00009"]
    context = contexts["gsm8k-00004"]
    (example,) = context.examples
    text = writer.decode(context.ids)
    assert text.count("Q: ") == text.count("\nA: ") == text.count("The answer is ") == 8
    assert text.startswith("Q: There are 15 trees in the grove.")
    assert text.endswith("23 - 15 is 8. The answer is 8.")
    assert example.question == "\n\nQ: Ann has 2 boxes of 600 nails. How many nails?\nA:"
    assert example.target == "Ann has 2 * 600 = 1200 nails. That is all. The answer is 1,200."
    assert example.answer_prefix == ""
    assert example.id == context.id == context.cluster_id
    assert {c.ids for c in contexts.values()} == {context.ids}
    assert len({c.cluster_id for c in contexts.values()}) == 3


def test_order_depends_on_the_seed_alone(data, writer):
    orders = {
        seed: tuple(context.id for context in GSM8K(data=data).contexts(writer, seed)) for seed in (0, 0, 1, 2, 3)
    }
    assert len(set(orders.values())) > 1
    assert {tuple(sorted(order)) for order in orders.values()} == {("gsm8k-00004", "gsm8k-00007", "gsm8k-00009")}
    assert orders[0] == tuple(context.id for context in GSM8K(data=data).contexts(writer, 0))


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("So 2 * 600 = 1200. The answer is 1200.", 1, 1),
        ("The answer is 1,200.", 1, 1),
        ("The answer is 1200", 1, 1),
        ("The answer is $1,200.", 0, 1),  # lm-eval's strict pattern has no currency
        ("It is 1200 nails.", 0, 1),
        ("The answer is 1200. Check: 2 * 600.", 1, 0),
        ("The answer is 7. No: The answer is 1200.", 0, 1),
        ("The answer is 1200.\n\nQ: What is 1 + 1?\nA: The answer is 2.", 1, 1),
        ("The answer is 12000.", 0, 0),
        ("The answer is -1200.", 0, 0),
        ("The answer is 1200.50.", 0, 0),
        ("I do not know", 0, 0),
        ("", 0, 0),
    ],
)
def test_score(answer, strict, flexible):
    example = Example("x", "", references=("1,200",), target="")
    assert build_plugin("tasks", "gsm8k", {"match": "strict"}).score(example, answer) == strict
    assert GSM8K().score(example, answer) == flexible


def test_every_reference_is_right(data, writer):
    for context in GSM8K(data=data).contexts(writer, 0):
        (example,) = context.examples
        for match in ("strict", "flexible"):
            assert build_plugin("tasks", "gsm8k", {"match": match}).score(example, example.target) == 1


def test_other_data_is_refused(tmp_path, writer):
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": "no number"}) + "\n")
    with pytest.raises(UsageError, match="not GSM8K"):
        next(GSM8K(data=str(file)).contexts(writer, 0))
    with pytest.raises(UsageError):
        next(GSM8K(data=str(tmp_path / "nothing.jsonl")).contexts(writer, 0))


def test_data_hash_is_that_of_the_rows(data, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(ROWS[0]) + "\n")
    assert GSM8K(data=data).data_hash() != GSM8K(data=str(other)).data_hash()


def test_the_hub_is_the_default():
    assert GSM8K.hub
    assert GSM8K().data == "hub:openai/gsm8k@740312add88f781978c0658806c59bc2815b9866:main"
