"""Prompts: the split is exact, and pieces encoded apart are the tokens of the whole."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvbench.errors import UsageError
from kvbench.fetch import embedded_model
from kvbench.prompt import Writer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sentencepiece_like(legacy: bool) -> PreTrainedTokenizerFast:
    """As Llama-2's: a blank is put before each text, bos before each prompt, and bytes stand for what is unknown."""
    words = ["▁", "a", "b", "c", ".", "▁a", "▁b", "ab", "▁ab", "<", "|", ">", "s", "e", "r"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocab)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def smollm2():
    try:
        return AutoTokenizer.from_pretrained(embedded_model())
    except UsageError as error:
        pytest.skip(str(error))


def test_prompt_is_the_template_with_the_message_in_it(smollm2):
    writer = Writer(smollm2)
    context, question, prefix = "Some text.\nAnd more of it, 12  345 — naïve.", "\nWhat is it?", " The answer is"
    prompt = writer.prompt(writer.encode(context), question, prefix)
    message = [{"role": "user", "content": context + question}]
    whole = smollm2.apply_chat_template(message, add_generation_prompt=True, tokenize=False) + prefix
    ids = prompt.context + prompt.question + prompt.tail
    assert list(ids) == smollm2(whole, add_special_tokens=False)["input_ids"]
    assert smollm2.decode(ids) == whole
    assert len(ids) == writer.overhead(question, prefix) + len(writer.encode(context))


def test_both_protocols_feed_the_same_tokens(smollm2):
    prompt = Writer(smollm2).prompt((5, 6, 7), " Why?", " Because")
    blind, aware = prompt.split("blind"), prompt.split("aware")
    assert blind[0] + blind[1] == aware[0] + aware[1]
    assert blind[0] == prompt.context
    assert aware[1] == prompt.tail


def test_tail_is_never_empty(smollm2):
    for chat in (True, False):
        assert Writer(smollm2, chat=chat).prompt((), "").tail


def test_without_a_template_a_start_token_only_where_the_tokenizer_puts_one(smollm2):
    assert smollm2.bos_token
    assert Writer(smollm2, chat=False).head == ()
    assert Writer(sentencepiece_like(legacy=True), chat=False).head == (1,)


@pytest.mark.parametrize("legacy", [True, False])
def test_start_token_of_the_template_is_not_doubled(legacy):
    prompt = Writer(sentencepiece_like(legacy)).prompt((), "a")
    assert (prompt.context + prompt.question + prompt.tail).count(1) == 1


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_pieces_are_the_tokens_of_the_whole_where_a_blank_is_added(legacy, chat):
    tokenizer = sentencepiece_like(legacy)
    writer = Writer(tokenizer, chat=chat)
    pieces = ["ab ab.", " ab a.", "\nb", " a"]
    assert writer.encode_all(pieces) == [writer.encode(piece) for piece in pieces]
    context = writer.encode(pieces[0]) + writer.encode(pieces[1])
    prompt = writer.prompt(context, pieces[2], pieces[3])
    ids = prompt.context + prompt.question + prompt.tail
    if chat:
        message = [{"role": "user", "content": "".join(pieces[:3])}]
        whole = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False) + pieces[3]
        assert list(ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    else:  # the context comes first, and gets no blank of its own
        assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(pieces[:3]) + "\n" + pieces[3]


def test_empty_texts(smollm2):
    for tokenizer in (smollm2, sentencepiece_like(legacy=True)):
        writer = Writer(tokenizer)
        assert writer.encode("") == ()
        assert writer.encode_all([]) == []


def test_answers_leave_out_the_end_of_turn(smollm2):
    writer = Writer(smollm2)
    assert writer.decode([*writer.encode(" 1234567 ."), smollm2.eos_token_id]) == " 1234567 ."


def test_templates_that_cannot_be_split(smollm2):
    plain = sentencepiece_like(legacy=True)
    plain.chat_template = None
    with pytest.raises(UsageError, match=r"model\.chat=false"):
        Writer(plain)
    plain.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    with pytest.raises(UsageError, match="once"):
        Writer(plain)
