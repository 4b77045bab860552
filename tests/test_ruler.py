"""RULER: wording, lengths, counts and places of what is asked; rows of kvpress's form."""

import re
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from conftest import byte_tokenizer
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from kvbench import config, corpora, plugins
from kvbench.errors import UsageError
from kvbench.fetch import corpus, embedded_model
from kvbench.prompt import Writer
from kvbench.toolbox.ruler import SETS, score

RULER = plugins.load("tasks", "ruler")
EXACT = [name for name in SETS if name not in ("cwe", "qa_1", "qa_2")]
# What stands before and after what is read, {} for what is drawn.
WORDING = {
    "niah_single_1": (
        "<u>A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the number afterwards.\n",
        "\nWhat is the special magic number for {} mentioned in the provided text?</u><a>"
        " The special magic number for {} mentioned in the provided text is",
    ),
    "niah_multikey_3": (
        "<u>A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the uuid afterwards.\n",
        "\nWhat is the special magic uuid for {} mentioned in the provided text?</u><a>"
        " The special magic uuid for {} mentioned in the provided text is",
    ),
    "niah_multivalue": (
        "<u>Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n",
        "\nWhat are all the special magic numbers for {} mentioned in the provided text?</u><a>"
        " The special magic numbers for {} mentioned in the provided text are",
    ),
    "vt": (
        "<u>Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        "\n\nMemorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}"
        "\nQuestion: Find all variables that are assigned the value {} in the text above.</u><a>"
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        "value {}, they are: ",
    ),
    "cwe": (
        "<u>Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n1. ",
        "\nQuestion: What are the 10 most common words in the above list?</u><a>"
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": (
        "<u>Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?</u><a>"
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa_1": (
        "<u>Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nThe following are given documents.\n\nDocument 1:\n",
        "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nQuestion: {}</u><a> Answer:",
    ),
}


@pytest.fixture(scope="module")
def bytewise():
    try:
        corpus("essays")
    except UsageError as error:
        pytest.skip(str(error))
    return Writer(byte_tokenizer())


@pytest.fixture(scope="module")
def writer(bytewise):
    try:
        return Writer(AutoTokenizer.from_pretrained(embedded_model()))
    except UsageError as error:
        pytest.skip(str(error))


def prompt(writer, context):
    (example,) = context.examples
    parts = writer.prompt(context.ids, example.question, example.answer_prefix)
    return parts.context + parts.question + parts.tail


def some(writer, number, *sets, seed=0, **options):
    options |= {"sets": sets} if sets else {}
    return list(islice(RULER(**options).contexts(writer, seed), number))


@pytest.mark.parametrize("name", WORDING)
def test_wording(bytewise, name):
    (context,) = some(bytewise, 1, name, context=5000)
    text = bytewise.tokenizer.decode(prompt(bytewise, context)).removeprefix("<s>")
    begin, end = WORDING[name]
    assert text.startswith(begin)
    assert re.search(".+".join(map(re.escape, end.split("{}"))) + "$", text, re.S)


@pytest.mark.parametrize("length", [1024, 4096, 8192])
@pytest.mark.parametrize("real", [True, False], ids=["real", "bytes"])
def test_lengths(request, real, length):
    writer = request.getfixturevalue("writer" if real else "bytewise")
    sets = SETS if real or length > 3000 else tuple(name for name in SETS if name not in ("cwe", "niah_multikey_3"))
    for context in some(writer, 2 * len(sets), *sets, context=length):
        name, ids = context.examples[0].info["set"], prompt(writer, context)
        if name in EXACT:
            assert len(ids) == length
        else:
            document = 800 if real else 4000  # the longest paragraph
            assert length - (40 if name == "cwe" else document) < len(ids) <= length
        if real:
            assert writer.encode(writer.tokenizer.decode(ids)) == ids  # as if tokenised whole


def test_needles(bytewise):
    """What is hidden can be read off the text, distractors and all."""
    for context in some(bytewise, 24, *SETS[:8], context=4096):
        text, example = bytewise.decode(context.ids), context.examples[0]
        key = example.question.partition(" for ")[2].partition(" mentioned")[0]
        found = dict.fromkeys(re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", text))
        asked = [value for _, name, value in found if name in key.replace(",", "").split()]
        assert sorted(asked) == sorted(example.references)
        name = example.info["set"]
        assert {kind for kind, *_ in found} == {"uuids" if name in ("niah_single_3", "niah_multikey_3") else "numbers"}
        hidden = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
        assert len(found) > 25 if name in ("niah_multikey_2", "niah_multikey_3") else len(found) == hidden
        assert len(example.references) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)


def test_variables_are_a_chain(bytewise):
    for context in some(bytewise, 5, "vt", context=5000):
        example = context.examples[0]
        solved, _, text = bytewise.decode(context.ids).rpartition("Memorize and track")
        value = re.search(r"the value (\d+) in", example.question)[1]
        for part, number, names in ((text, value, example.references), (solved, r"\d{5}", None)):
            first = re.search(rf"VAR (\w+) = {number}\n", part)[1]
            chain = [first]
            while (following := re.search(rf"VAR (\w+) = VAR {chain[-1]} ", part)) is not None:
                chain.append(following[1])
            assert len(chain) == 5
            assert tuple(chain) == names or solved.endswith(f"they are:  {' '.join(chain)}\n\n")
        assert example.target == " " + " ".join(example.references)


def test_common_words_are_common(bytewise):
    for length, many, few in ((4096, 6, 1), (9000, 30, 3)):
        (context,) = some(bytewise, 1, "cwe", context=length)
        example = context.examples[0]
        solved, _, text = bytewise.decode(context.ids).rpartition("appear most often.\n")
        words = text.split()
        assert words[::2] == [f"{i}." for i in range(1, len(words) // 2 + 1)]
        counts = Counter(words[1::2])
        assert {word for word, count in counts.items() if count == many} == set(example.references)
        assert set(counts.values()) == {many, few}
        assert len(example.references) == 10
        assert re.search(r"in the list are: 1\. \S+ 2\. .+ 10\. \S+\n", solved)


def test_frequent_words_are_frequent(bytewise, writer):
    for tokens, length in ((bytewise, 700), (bytewise, 4096), (writer, 512), (writer, 4096)):
        for context in some(tokens, 10, "fwe", context=length):
            text = tokens.decode(context.ids).rpartition("coded words. ")[2]
            counts = Counter(word for word in text.split() if not word.startswith(".")).most_common(4)
            assert {word for word, _ in counts[:3]} == set(context.examples[0].references)
            assert len(counts) == 3 or counts[2][1] > counts[3][1]


def test_documents_have_the_answer_at_changing_places_and_no_calibration_text(bytewise):
    reserved = [text for source in ("squad", "hotpotqa") for text in corpora.documents(source, "calibration")]
    paragraphs = set(reserved[10:]) | {part for text in reserved[:10] for part in text.split("\n\n")}
    contexts = some(bytewise, 60, "qa_1", "qa_2", context=8192)
    for context in contexts:
        text, example = bytewise.decode(context.ids), context.examples[0]
        documents = re.split(r"\n\nDocument \d+:\n", text)[1:]
        assert len(documents) == len(set(documents)) == example.info["documents"]
        assert not paragraphs.intersection(documents)
        gold = [documents[round(depth * (len(documents) - 1))] for depth in example.info["depths"]]
        assert len(gold) == (1 if example.info["set"] == "qa_1" else 2)
        assert example.references[0] in ("yes", "no") or any(example.references[0] in part for part in gold)
    for name in ("qa_1", "qa_2"):
        places = [e.info["depths"][0] for c in contexts for e in c.examples if e.info["set"] == name]
        assert np.histogram(places, 3, (0, 1))[0].min() >= 3
        assert len({context.cluster_id for context in contexts if context.id.startswith(name)}) > 8


def test_no_calibration_text_in_essays(writer):
    text = " ".join(" ".join(corpora.documents("essays", "task")).split())
    text += " " + text[:50_000]
    for context in some(writer, 10, "niah_single_2", context=1024):
        found = writer.decode(context.ids).partition("afterwards.\n")[2]
        assert found.partition("One of the special magic")[0].strip().rstrip("\ufffd") in text


def test_an_example_depends_on_set_seed_and_index_only(bytewise):
    drawn = ("niah_multikey_2", "vt", "cwe", "fwe", "qa_1")  # quick with a new writer
    assert some(Writer(byte_tokenizer()), 8, *drawn, context=5000) == some(bytewise, 10, *drawn, context=5000)[:8]
    many = some(bytewise, 26, context=5000)
    assert [context.examples[0].info["set"] for context in many] == [*SETS, *SETS]  # in turn
    assert some(bytewise, 2, "qa_2", context=5000) == [many[12], many[25]]
    assert len({context.id for context in many}) == len({context.ids for context in many}) == 26
    other = some(bytewise, 26, seed=1, context=5000)
    assert not {context.ids for context in many} & {context.ids for context in other}
    assert not {context.id for context in many} & {context.id for context in other}


def test_scores():
    for name in ("niah_multivalue", "vt", "cwe", "fwe"):
        assert score(name, ("ABC", "def", "ghi", "jkl"), "abc, DEF and so on") == 0.5
        assert score(name, ("ABC",), "none") == 0
        assert score(name, ("ABC", "def"), "xabcdef") == 1
    assert score("qa_1", ("Paris", "the city of Paris"), "It is PARIS.") == 1
    assert score("qa_2", ("Paris", "Rome"), "London") == 0


@pytest.mark.parametrize("name", [name for name in SETS if name != "qa_2"])  # seconds
def test_impossible_lengths_name_the_smallest_possible_one(writer, name):
    with pytest.raises(UsageError, match=f"too short for {name}: use") as error:
        RULER(sets=(name,), context=60).contexts(writer, 0)
    least = int(str(error.value).split()[-3])
    assert all(
        len(prompt(writer, context)) <= least
        for context in some(writer, 1 if name == "qa_1" else 5, name, context=least)
    )
    with pytest.raises(UsageError):
        RULER(sets=(name,), context=least - 1).contexts(writer, 0)


def test_thirteen_sets_are_made_in_seconds(writer):
    some(writer, 13)  # tokenises the essays
    start = time.perf_counter()
    some(writer, 65)
    assert time.perf_counter() - start < 15


def test_options():
    with pytest.raises(UsageError, match=r"unknown set 'niah'; known: niah_single_1, .*, qa_2"):
        RULER(sets=("vt", "niah"))
    for options in ({"sets": ()}, {"sets": ("vt", "vt")}, {"max_new_tokens": -1}):
        with pytest.raises(UsageError):
            RULER(**options)
    assert config.build_plugin("tasks", "ruler", {"sets": ["vt"], "context": 512}) == RULER(sets=("vt",), context=512)
    assert OmegaConf.structured(RULER).sets == list(SETS)


def test_answers_are_as_long_as_the_authors_allow(bytewise):
    allowed = {c.examples[0].info["set"]: c.examples[0].max_new_tokens for c in some(bytewise, 13, context=5000)}
    expected = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert allowed == {name: expected.get(name, 128) for name in SETS}
    assert some(bytewise, 1, "vt", context=5000, max_new_tokens=7)[0].examples[0].max_new_tokens == 7


def test_data_hash_is_that_of_the_sets(bytewise):
    hashes = [RULER(sets=sets).data_hash() for sets in (("niah_single_2",), ("qa_1",), ("qa_2",), ("vt",), SETS)]
    assert len(set(hashes)) == 5
    assert RULER(sets=("qa_1",), context=99).data_hash() == hashes[1]


ROWS = [
    {
        "context": f"Read this: text {i} of {task}.\n",
        "question": "What is it? ",
        "answer_prefix": "Answer:",
        "answer": ["one", "two"],
        "task": task,
        "max_new_tokens": 30,
    }
    for task in ("vt", "qa_1", "another")
    for i in range(2)
]


@pytest.fixture
def parquet(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def test_rows_of_kvpress(parquet):
    writer = Writer(byte_tokenizer())
    contexts = list(RULER(data=parquet).contexts(writer, 0))
    assert [context.id for context in contexts] == ["vt-00000", "qa_1-00000", "vt-00001", "qa_1-00001"]
    assert writer.decode(contexts[0].ids) == ROWS[0]["context"]
    first, second = (context.examples[0] for context in contexts[:2])
    assert (first.question, first.answer_prefix, first.references) == ("What is it? ", "Answer:", ("one", "two"))
    assert (first.target, second.target) == (" one two", " one")
    assert (first.max_new_tokens, first.info["set"]) == (30, "vt")
    assert first.info["context"] == len(prompt(writer, contexts[0]))
    task = RULER(data=parquet, sets=("qa_1",), max_new_tokens=5)
    assert [c.examples[0].max_new_tokens for c in task.contexts(writer, 0)] == [5, 5]
    assert task.score(second, "Two!") == 1
    assert task.score(first, "Two!") == 0.5
    assert task.data_hash() == RULER(data=parquet).data_hash() != RULER(sets=("vt",)).data_hash()


def test_rows_that_are_not_there(parquet, tmp_path):
    writer = Writer(byte_tokenizer())
    with pytest.raises(UsageError, match="no rows of cwe"):
        RULER(data=parquet, sets=("cwe", "vt")).contexts(writer, 0)
    with pytest.raises(UsageError):
        RULER(data=str(tmp_path / "nothing.parquet")).contexts(writer, 0)
    (tmp_path / "other.jsonl").write_text('{"context": "a", "task": "vt"}\n')
    with pytest.raises(UsageError, match="no question, answer_prefix, answer, max_new_tokens"):
        RULER(data=str(tmp_path / "other.jsonl")).contexts(writer, 0)
