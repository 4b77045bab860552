"""Needles in a haystack: exact lengths, needles that are there once, texts that are not for calibration."""

import time
from itertools import islice

import numpy as np
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from kvbench import corpora, plugins
from kvbench.errors import UsageError
from kvbench.fetch import corpus, embedded_model
from kvbench.prompt import Writer
from kvbench.task import Example

NIAH = plugins.load("tasks", "niah")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
WORDING_ONE = """\
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number \
afterwards.
This is sentence 1894, by Mr. Smith. This is sentence 1895, by Mr. Smith. \
One of the special magic numbers for loving-blessing is: 1783007. \
This is sentence 1896, by Mr. Smith. This is sentence 1897, by Mr. Smith. This is sentence 1898,
What is the special magic number for loving-blessing mentioned in the provided text?<|im_end|>
<|im_start|>assistant
 The special magic number for loving-blessing mentioned in the provided text is"""
WORDING_TWO = """\
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the \
numbers afterwards.
One of the special magic numbers for loving-blessing is: 9762652.
{noise}
One of the special magic numbers for annoyed-receipt is: 1496177.
What are all the special magic numbers for loving-blessing, and annoyed-receipt mentioned in the provided text?\
<|im_end|>
<|im_start|>assistant
 The special magic numbers for loving-blessing, and annoyed-receipt mentioned in the provided text are""".replace(
    "{noise}", (6 * NOISE).removesuffix(".\n")
)


@pytest.fixture(scope="module")
def writer():
    try:
        corpus("essays")
        return Writer(AutoTokenizer.from_pretrained(embedded_model()))
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text file with the number of each sentence in it."""
    file = tmp_path_factory.mktemp("book") / "book.txt"
    file.write_text("".join(f"This is sentence {i}, by Mr. Smith.{'  ' if i % 5 else chr(10)}" for i in range(3000)))
    return str(file)


def prompt(writer, context):
    example = context.examples[0]
    parts = writer.prompt(context.ids, example.question, example.answer_prefix)
    return parts.context + parts.question + parts.tail


def some(writer, number=5, seed=0, **options):
    return list(islice(NIAH(**options).contexts(writer, seed), number))


@pytest.mark.parametrize("length", [256, 257, 512, 1000, 2048, 4096, 8192])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"haystack": "noise"},
        {"needles": 2, "ask": 1, "depths": [0.0, 1.0]},
        {"needles": 2, "ask": 1, "depths": [0.5, 0.5], "haystack": "noise"},
        {"haystack": "book", "depths": [0.0, 0.3, 1.0]},
    ],
    ids=str,
)
def test_length_is_exact_and_every_needle_is_there_once(writer, book, length, options):
    if options.get("haystack") == "book":
        options = options | {"haystack": book}
    for context in some(writer, context=length, **options):
        ids = prompt(writer, context)
        text = writer.tokenizer.decode(ids)
        assert len(ids) == length
        assert text.count("One of the special magic numbers for ") == options.get("needles", 1)
        (value,) = context.examples[0].references
        key = context.examples[0].question.removeprefix("\nWhat is the special magic number for ").partition(" ")[0]
        assert text.count(f"One of the special magic numbers for {key} is: {value}.") == 1


def test_all_needles_are_asked_or_some_of_them(writer):
    for context in some(writer, needles=4):
        text, example = writer.decode(context.ids), context.examples[0]
        assert len(set(example.references)) == len(example.info["depths"]) == 4
        assert all(text.count(f" is: {value}.") == 1 for value in example.references)
        assert example.question.startswith("\nWhat are all the special magic numbers for ")
        first, second, third, fourth = example.references
        assert example.target == f" {first}, {second}, {third}, and {fourth}."
    for context in some(writer, needles=4, ask=1):
        text, example = writer.decode(context.ids), context.examples[0]
        assert len(example.references) == len(example.info["depths"]) == 1
        assert text.count("One of the special magic numbers for ") == 4
        assert text.startswith("A special magic number is hidden")
        assert example.target == f" {example.references[0]}."


def test_wording(writer, book):
    (context,) = some(writer, 1, context=180, haystack=book, depths=[0.5], max_new_tokens=16)
    example = context.examples[0]
    assert writer.tokenizer.decode(prompt(writer, context)) == WORDING_ONE
    assert example.references == ("1783007",)
    assert example.target == " 1783007."
    assert example.id == context.id == "niah-0-00000"
    assert example.max_new_tokens == 16
    (context,) = some(writer, 1, context=300, haystack="noise", needles=2, depths=[0.0, 1.0])
    assert writer.tokenizer.decode(prompt(writer, context)) == WORDING_TWO


def test_tokens_are_those_of_the_text(writer):
    for context in some(writer, 20, needles=3) + some(writer, needles=3, haystack="noise"):
        ids = prompt(writer, context)
        assert writer.encode(writer.tokenizer.decode(ids)) == ids


def test_no_calibration_text_in_any_haystack(writer):
    """Word by word: every haystack is a stretch of the task side's essays."""
    task, calibration = (corpora.documents("essays", part) for part in ("task", "calibration"))
    assert not set(task) & set(calibration)
    assert set(task) | set(calibration) < set(corpora.essays())  # without those that quote the task side
    assert len(corpora.essays()) == 213
    assert len(task) == 163
    assert 0.15 < sum(map(len, calibration)) / sum(map(len, corpora.essays())) < 0.25
    text = " ".join(" ".join(task).split())
    text += " " + text[:100_000]
    clusters = set()
    for context in some(writer, 200, context=2048):
        found = writer.decode(context.ids).partition("afterwards.\n")[2]
        before, _, rest = found.partition("One of the special magic numbers for ")
        after = rest.partition(". ")[2]
        # An end cut within a character cannot be decoded.
        assert before.strip().rstrip("\ufffd") in text
        assert after.strip().rstrip("\ufffd") in text
        clusters.add(context.cluster_id)
    assert len(clusters) == 163  # each document had its turn


def test_needles_are_between_sentences_at_their_depths(writer, book):
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    for context, depth in zip(some(writer, context=4096, haystack=book, depths=depths), depths, strict=True):
        before, _, after = writer.decode(context.ids).partition("One of the special magic numbers for ")
        assert context.examples[0].info["depths"] == [pytest.approx(depth, abs=0.02)]
        assert depth == 1 or before[-2:] == (".\n" if depth == 0 else ". ")
        assert depth == 1 or ". This is sentence " in after
    for context in some(writer, haystack="noise", needles=3):
        lines = writer.decode(context.ids).split("\n")[1:]
        assert sum(line.startswith("One of") for line in lines) == 3
        assert {line for line in lines[:-1] if not line.startswith("One of")} == {NOISE.rstrip()}


def test_depths_are_drawn_all_over(writer):
    depths = [context.examples[0].info["depths"][0] for context in some(writer, 200, context=1024)]
    assert np.histogram(depths, 4, (0, 1))[0].min() > 30


def test_a_short_text_is_repeated(writer, tmp_path):
    for number in range(8):  # so that some are on the task side
        (tmp_path / f"{number}.txt").write_text(f"Here is text {number}. It is short. ")
    (context,) = some(writer, 1, context=1024, haystack=str(tmp_path))
    assert len(prompt(writer, context)) == 1024


def test_an_example_depends_on_seed_and_index_only(writer):
    many = some(writer, 12, context=600, needles=2, depths=[0.1, 0.5, 0.9])
    again = Writer(writer.tokenizer)
    assert some(again, 5, context=600, needles=2, depths=[0.1, 0.5, 0.9]) == many[:5]
    assert len({context.ids for context in many}) == len({context.id for context in many}) == 12
    other = some(writer, 12, seed=1, context=600, needles=2, depths=[0.1, 0.5, 0.9])
    assert not {context.ids for context in many} & {context.ids for context in other}
    assert not {context.id for context in many} & {context.id for context in other}


def test_score():
    example = Example("x", "", references=("1234567", "7654321"), target="")
    task = NIAH()
    assert task.score(example, " 1234567, and 7654321.") == 1
    assert task.score(example, "the numbers: 7654321") == 0.5
    assert task.score(example, "123456 7654 321") == 0
    assert task.score(example, "") == 0


@pytest.mark.parametrize("options", [{}, {"needles": 4}, {"needles": 4, "ask": 1}, {"haystack": "noise"}], ids=str)
def test_impossible_lengths_name_the_smallest_possible_one(writer, options):
    with pytest.raises(UsageError, match="or more") as error:
        NIAH(context=20, **options).contexts(writer, 0)
    least = int(str(error.value).split()[-3])
    assert {len(prompt(writer, context)) for context in some(writer, 50, context=least, **options)} == {least}
    with pytest.raises(UsageError):
        NIAH(context=least - 1, **options).contexts(writer, 0)


@pytest.mark.parametrize(
    "options",
    [{"needles": 0}, {"needles": 2, "ask": 3}, {"ask": -1}, {"depths": [1.5]}, {"needles": 41}],
    ids=str,
)
def test_impossible_options(options):
    with pytest.raises(UsageError):
        NIAH(**options)


def test_haystacks_that_are_not_there(writer):
    with pytest.raises(UsageError, match="neither"):
        next(NIAH(haystack="/nowhere").contexts(writer, 0))


def test_fields_are_a_hydra_schema():
    schema = OmegaConf.merge(OmegaConf.structured(NIAH), {"depths": [0, 1], "context": 512})
    assert OmegaConf.to_object(schema) == NIAH(context=512, depths=[0.0, 1.0])


def test_data_hash_is_that_of_the_text_used(writer, book):
    hashes = [NIAH(haystack=haystack).data_hash() for haystack in ("essays", "noise", book)]
    assert len(set(hashes)) == 3
    assert NIAH(context=100).data_hash() == hashes[0]


def test_contexts_are_made_quickly(writer):
    some(writer, 1)
    start = time.perf_counter()
    some(writer, 100, context=8192, needles=4)
    assert time.perf_counter() - start < 5


def test_documents_are_split_by_their_text_alone(tmp_path):
    texts = [f"Document {i}." for i in range(400)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03d}.txt").write_text(text)
    reserved = corpora.documents(str(tmp_path), "calibration")
    assert list(reserved) == [text for text in texts if corpora.calibration_part(text)]
    assert 60 < len(reserved) < 140
    assert set(reserved).isdisjoint(corpora.documents(str(tmp_path), "task"))


def test_calibration_only_sources():
    for source in ("pydoc", "stdlib"):
        assert corpora.documents(source, "calibration") == corpora.documents(source, "calibration")
        with pytest.raises(UsageError, match="calibration only"):
            corpora.documents(source, "task")
