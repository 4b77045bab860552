"""kvbench's methods as a model of lm-eval (0.4.13): its command line, with `--model kvbench`.

  python -m kvbench.lm_eval_model --model kvbench --tasks arc_easy,gsm8k --limit 100 \\
      --model_args model=smollm2-135m,method=snapkv,budget=0.25,method.window=32

lm-eval has a table of models and no entry points, so its own program `lm_eval` can't know this one: the module above is
that program with the table one line longer. From Python, importing this module is enough:
`simple_evaluate(model="kvbench", model_args={"method": "snapkv", "budget": 0.25}, ...)`.

`model`, `method`, `budget`, `model.<option>` and `method.<option>` are those of `python -m kvbench.run`.

What is measured: a request's context is read exactly and compressed but for its last token, which is fed after
compression, so that every token of the answer sees the compressed cache. Equal contexts (the choices of a question)
are compressed once. With `method=full` the answers are those of lm-eval's own `hf` model. What has no context to
compress is scored exactly if it is a choice's unconditional likelihood, and refused if it is a whole text (perplexity
tasks). Prompts longer than the model reads lose their beginning, as with `hf`. Answers are greedy, one at a time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from kvbench.answer import ended_by
from kvbench.cache.fork import Fork
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.compressor import Compressor
from kvbench.config import convert
from kvbench.decode import feed, greedy
from kvbench.errors import UsageError
from kvbench.model import load_model
from kvbench.prefill import Reader
from kvbench.run import BAD_INPUT, one_line
from kvbench.sweep import composed

_LOG = logging.getLogger(__name__)

Ids = list[int]
Pair = tuple[tuple[str, str], Ids, Ids]  # (context, continuation) as texts, then the tokens of each


@register_model("kvbench")
class KVBench(TemplateLM):
    """A model of kvbench under one of its methods."""

    def __init__(
        self,
        model: str = "smollm2-135m",
        method: str = "full",
        budget: str | float | int = 0.1,
        device: str | None = None,
        batch_size: str | int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise UsageError(f"batch_size={batch_size}: contexts are compressed one at a time, leave it at 1")
        if unknown := [name for name in options if name.partition(".")[0] not in ("model", "method")]:
            raise UsageError(f"unknown model argument '{unknown[0]}'; known: model, method, budget, model.*, method.*")
        # lm-eval names cuda:0 unless it is told another device, and its own models take the CPU where there is none.
        if device and (torch.cuda.is_available() or not device.startswith("cuda")):
            options["model.device"] = device
        self._cell = _cell({"model": model, "method": method, "budget": str(budget), "model.chat": False} | options)
        self._model = load_model(self._cell.model)
        self._network = self._model.network
        self._compressor = Compressor(self._cell, self._model)
        self._contexts = self._held = self._full = 0
        self.tokenizer = self._model.writer.tokenizer

    # -- what lm-eval asks of a model ------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._network.max_positions

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._cell.model.template,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """The tokenizer's start token is put before a text unless a chat template has."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results file says of the model, once everything has been asked."""
        identity = self._cell.identity()
        artefacts = sorted(artefact.digest for artefact in self._compressor.artefacts.values())
        return {
            "kvbench": {key: identity[key] for key in ("model", "method", "budget")}
            | {"facts": self._model.facts, "artefacts": artefacts}
            | {"contexts": self._contexts, "bytes_held": self._held, "bytes_full": self._full}
        }

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in tqdm(requests, desc="kvbench: answers", disable=disable_tqdm):
            prompt, options = request.args
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(options))
            if wanted["do_sample"]:
                raise UsageError("kvbench answers greedily: add --gen_kwargs do_sample=false,temperature=0")
            eos = self.tokenizer.decode([self.eot_token_id])
            until, most = handle_stop_sequences(wanted["until"], eos), wanted["max_gen_toks"]
            if most >= self.max_length:
                raise UsageError(f"max_gen_toks={most}: the model reads {self.max_length} tokens, answer included")
            ids = self._cut(self.tok_encode(prompt), self.max_length - most)
            if len(ids) < 2:
                raise UsageError(f"a prompt of {len(ids)} token leaves nothing to compress")
            text = self._answer(self._compress(ids[:-1]), ids[-1], until, most)
            found.append(postprocess_generated_text(text, until, None))
            self.cache_hook.add_partial("generate_until", (prompt, options), found[-1])
        return found

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        together: dict[tuple[int, ...], list[int]] = {}  # context -> the requests about it
        for i, (_, context, continuation) in enumerate(requests):
            together.setdefault(tuple(self._cut(context, self.max_length + 1 - len(continuation))), []).append(i)
        with tqdm(total=len(requests), desc="kvbench: choices", disable=disable_tqdm) as bar:
            for ids, asked in together.items():
                cache = self._compress(ids[:-1]) if len(ids) > 1 else None
                for i in asked:
                    texts, _, continuation = requests[i]
                    found[i] = self._weigh(cache, ids[-1], continuation)
                    self.cache_hook.add_partial("loglikelihood", texts, found[i])
                    bar.update()
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise UsageError(
            "the perplexity of a whole text has no context that could be compressed: "
            "use `python -m kvbench.run task=lm`, the NLL of a continuation"
        )

    # -- the loop --------------------------------------------------------------------------------------------------

    def _compress(self, ids: Sequence[int]) -> CompressedCache:
        tokens = torch.tensor(ids, device=self._network.device)
        cache = self._compressor.compress(self._compressor.read(tokens))
        self._contexts += 1
        self._held += cache.nbytes
        self._full += self._network.row_bytes() * len(ids)
        return cache

    def _weigh(self, cache: CompressedCache | None, last: int, continuation: Ids) -> tuple[float, bool]:
        """Summed log-probability (nats) of a continuation, and whether each token of it is the likeliest one."""
        fed = torch.tensor([[last, *continuation[:-1]]], device=self._network.device)
        if cache:
            logits = feed(self._network, [Fork(cache, self._cell.method)], fed)
        else:  # the only token before it is `last`
            position = torch.arange(fed.shape[1], device=fed.device)[None]
            logits = self._network.logits(self._network.hidden(fed, position, Reader(self._network, fed[0]).recorders))
        logprobs = logits[0].float().log_softmax(-1)
        total = logprobs[range(len(continuation)), continuation].sum()
        return float(total), logprobs.argmax(-1).tolist() == continuation

    def _answer(self, cache: CompressedCache, last: int, until: list[str], most: int) -> str:
        """The greedy answer, decoded until its text has a stop string."""
        fork = Fork(cache, self._cell.method)
        token = torch.tensor([[last]], device=self._network.device)
        first = feed(self._network, [fork], token, last_only=True)[0, -1]
        ended = ended_by(self._model, until)
        [answer] = greedy(self._network, [fork], first[None], ended, most, self._model.rows)
        return self._model.writer.decode(answer)

    def _cut(self, ids: Ids, most: int) -> Ids:
        if len(ids) > most:
            _LOG.warning("a prompt of %d tokens loses its beginning: the model reads %d", len(ids), self.max_length)
        return ids[-most:]


def _cell(settings: dict[str, Any]) -> Cell:
    """Settings as of the command line, as a cell; its task is never asked."""
    return convert(composed(settings)).cell


def main() -> int:
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except BAD_INPUT as error:
        print(f"kvbench: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
