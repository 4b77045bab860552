"""Language modelling: stretches of exact length, continuations that are met again as text, no overlap."""

import itertools
from itertools import islice

import pytest
from conftest import byte_tokenizer
from transformers import AutoTokenizer

from kvbench import corpora, plugins
from kvbench.errors import UsageError
from kvbench.fetch import embedded_model
from kvbench.prompt import Writer

LM = plugins.load("tasks", "lm")


@pytest.fixture(scope="module")
def real():
    try:
        return Writer(AutoTokenizer.from_pretrained(embedded_model()))
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bytewise():
    return Writer(byte_tokenizer())


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Files of numbered sentences: some of a few sentences, some of many; two bytes to some of their characters."""
    folder = tmp_path_factory.mktemp("book")
    for i in range(40):
        sentences = (f"In text {i} this is the sentence number {j}, à propos. " for j in range(4 if i % 2 else 60))
        (folder / f"{i:02d}.txt").write_text("".join(sentences))
    return str(folder)


def some(writer, number, seed=0, **options):
    return list(islice(LM(**options).contexts(writer, seed), number))


def whole(writer, context):
    """The stretch's text."""
    return writer.decode(context.ids) + context.examples[0].target


@pytest.mark.usefixtures("corpora")
def test_essays_with_the_real_tokenizer(real):
    texts = corpora.documents("essays", "task")
    contexts = some(real, 40)
    for context in contexts:
        (example,) = context.examples
        assert not context.chat
        assert len(context.ids) == 2048 == len(real.prompt(context.ids, "", chat=False))
        target = real.encode(example.target)
        assert len(target) == 128
        text = whole(real, context)
        assert real.encode(text) == context.ids + target
        document = int(context.cluster_id.removeprefix("essays-"))
        assert text in texts[document]
        before = texts[document].partition(text)[0]
        assert not before or before.rstrip()[-1] in ".!?\"')"
        assert example.info == {"text": "essays", "context": 2048, "documents": 1}
        assert example.question == example.answer_prefix == ""
    # One stretch of each document before a second one of any.
    assert len({context.cluster_id for context in contexts}) == 40
    assert any(texts[int(c.cluster_id[7:])].startswith(whole(real, c)) for c in contexts)
    assert not all(texts[int(c.cluster_id[7:])].startswith(whole(real, c)) for c in contexts)


@pytest.mark.parametrize("size", [(300, 40), (301, 7), (64, 1)])
def test_lengths_and_no_overlap(bytewise, book, size):
    length, continuation = size
    contexts = some(bytewise, 60, text=book, context=length, continuation=continuation)
    assert len(contexts) == 60
    assert all(len(context.ids) == length for context in contexts)
    assert all(len(bytewise.encode(context.examples[0].target)) == continuation for context in contexts)
    texts = [whole(bytewise, context) for context in contexts]
    for a, b in itertools.combinations(texts, 2):  # sentences are numbered: no two have 60 characters in common
        assert a[:60] not in b
        assert b[:60] not in a


def test_short_documents_are_joined_before_a_long_one_gives_a_second_stretch(bytewise, book):
    contexts = some(bytewise, 400, text=book, context=500, continuation=20)
    joined = [context.examples[0].info["documents"] for context in contexts]
    clusters = [context.cluster_id for context in contexts]
    second = next(i for i, cluster in enumerate(clusters) if cluster in clusters[:i])
    assert max(joined[:second]) > 1
    assert second > 20
    texts = corpora.documents(book, "task")
    starts = set()
    for context in contexts:
        number = int(context.cluster_id.rpartition("-")[2])
        inside = whole(bytewise, context) in texts[number]
        assert inside == (context.examples[0].info["documents"] == 1)
        starts.add(whole(bytewise, context))
    assert len(starts) == len(contexts)  # later laps overlap, but nothing is there twice


def test_a_text_ends(bytewise, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"Here is text {i}. It is short. It ends.")
    texts = corpora.documents(str(tmp_path), "task")
    contexts = some(bytewise, 1000, text=str(tmp_path), context=30, continuation=5)
    assert len(texts) <= len(contexts) < 20
    with pytest.raises(UsageError, match="no stretch of 10128 tokens"):
        some(bytewise, 1, text=str(tmp_path), context=10_000)


def test_an_example_depends_on_seed_and_index_only(bytewise, book):
    many = some(bytewise, 30, text=book, context=400, continuation=20)
    assert some(Writer(bytewise.tokenizer), 7, text=book, context=400, continuation=20) == many[:7]
    assert [context.id for context in many[:2]] == ["lm-0-00000", "lm-0-00001"]
    other = some(bytewise, 30, seed=1, text=book, context=400, continuation=20)
    assert other[0].ids != many[0].ids
    assert not {context.id for context in many} & {context.id for context in other}


def test_a_start_token_counts(book):
    tokenizer = byte_tokenizer()
    tokenizer.add_bos_token = True
    writer = Writer(tokenizer)
    (context,) = some(writer, 1, text=book, context=300, continuation=20)
    assert len(writer.prompt(context.ids, "", chat=False)) == 300


def test_refusals(bytewise, book):
    for options in ({"context": 1}, {"text": "/nowhere"}):
        with pytest.raises(UsageError):
            some(bytewise, 1, **({"text": book} | options))
    with pytest.raises(UsageError):
        LM(continuation=0)


def test_it_has_no_score():
    assert not LM.generates


def test_data_hash_is_that_of_the_text(book):
    assert LM(text=book).data_hash() == corpora.text_hash(corpora.documents(book, "task"))
