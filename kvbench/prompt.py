"""From text to the model's tokens: the chat template, split where the cache is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.errors import UsageError

_MARK = "<<<kvbench>>>"


@dataclass(frozen=True)
class Prompt:
    """The three parts of one prompt, in order, as token ids.

    `blind` compresses `context` and feeds `question + tail`; `aware` compresses `context + question` and feeds `tail`.
    """

    context: tuple[int, ...]  # template head and context
    question: tuple[int, ...]
    tail: tuple[int, ...]  # end of the user's turn, assistant header, answer prefix: at least one token

    def __len__(self) -> int:
        return len(self.context) + len(self.question) + len(self.tail)

    def split(self, protocol: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(compressed, fed after compression) under `blind` or `aware`."""
        if protocol == "aware":
            return self.context + self.question, self.tail
        return self.context, self.question + self.tail


class Writer:
    """A tokenizer and its chat template. A prompt's parts are encoded apart, so both protocols see equal tokens."""

    def __init__(self, tokenizer: Any, chat: bool = True, template_options: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        # SentencePiece tokenizers put a blank before every text they are given; within a prompt there is none.
        self._adds_blank = tokenizer.convert_ids_to_tokens(self._plain(["a"])[0])[0] != "a"
        # Some tokenizers name a start token but put none before a text (SmolLM2, Qwen).
        bos = tokenizer.bos_token_id
        self._plain_head: tuple[int, ...] = (bos,) if bos is not None and bos in tokenizer("")["input_ids"][:1] else ()
        self.head: tuple[int, ...]
        self.head, self._tail, self._between = self._plain_head, "\n", "\n\n"
        if chat:
            head, self._tail = self._render(["user"], template_options or {})
            self._between = self._render(["user", "assistant", "user"], template_options or {})[2]
            self.head = self._plain([head])[0]  # has the template's own start token, if any

    def _render(self, roles: Sequence[str], options: dict[str, Any]) -> list[str]:
        """The template's own text before, between and after the messages of a conversation."""
        if not self.tokenizer.chat_template:
            raise UsageError("this model's tokenizer has no chat template: set model.chat=false")
        messages = [{"role": role, "content": _MARK} for role in roles]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        parts = text.split(_MARK)
        if len(parts) != len(roles) + 1:
            raise UsageError("this model's chat template does not show each message once: set model.chat=false")
        return parts

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` within a prompt: nothing is put around it, no special token and no blank."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """`encode` of each, much faster than one by one."""
        if not self._adds_blank:
            return self._plain(texts)
        before = self._plain(["\n"])[0]  # takes the blank, and is merged with nothing where a blank is added
        found = self._plain(["\n" + text for text in texts])
        if any(ids[: len(before)] != before for ids in found):
            raise UsageError(
                "this model's tokenizer merges a line end with the text after it, which is not implemented"
            )
        return [ids[len(before) :] for ids in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer: special tokens (end of turn) are left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt(self, context: tuple[int, ...], question: str, answer_prefix: str = "", chat: bool = True) -> Prompt:
        """The first turn. `chat=False` is plain text that goes on; what is fed last has at least one token."""
        if chat:
            return Prompt(self.head + context, self.encode(question), self.encode(self._tail + answer_prefix))
        context, asked, tail = self._plain_head + context, self.encode(question), self.encode(answer_prefix)
        if not tail:
            context, asked, tail = (context, asked[:-1], asked[-1:]) if asked else (context[:-1], (), context[-1:])
        return Prompt(context, asked, tail)

    def follow_up(self, question: str, answer_prefix: str = "") -> tuple[int, ...]:
        """What is fed for a later turn, from the end of the answer before it on."""
        return self.encode(self._between + question) + self.encode(self._tail + answer_prefix)

    def overhead(self, question: str, answer_prefix: str = "") -> int:
        """Tokens of the whole prompt that are not the context's own."""
        return len(self.prompt((), question, answer_prefix))

    def _plain(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """What the tokenizer makes of each text; of no text, nothing."""
        if not texts:
            return []
        # Not verbose: a text longer than the model's window is no mistake here, it may be cut later.
        return [tuple(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
