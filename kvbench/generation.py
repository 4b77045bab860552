"""Compression around a plain `model.generate`, for a transformers model of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import AutoTokenizer

from kvbench.answer import usage_fields
from kvbench.budget import Budget
from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network, Step, borrowed, generating
from kvbench.cell import Cell, ModelConfig
from kvbench.compressor import Compressor
from kvbench.config import DTYPES, build
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.list import choices
from kvbench.method import Method
from kvbench.model import Model, end_ids, pretrained
from kvbench.plugins import known
from kvbench.prompt import Writer
from kvbench.run import one_line
from kvbench.sweep import composed


class Held:
    """What the last `generate` held, by the names of docs/metrics.md: `bytes_held`, `bytes_full`, `tokens_kept`, ..."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._fork: Fork | None = None

    def describe(self) -> dict[str, Any]:
        """All of it; what was held and read per token is that of the tokens fed and generated so far."""
        fork = self._fork
        if fork is None:
            return {}
        return self._facts | {"bytes_tail": fork.tail_bytes} | (usage_fields(fork.usage) if len(fork.usage) else {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in (facts := self.describe()):
            raise AttributeError(f"{name}: nothing like that, or no generate yet")
        return facts[name]

    def __repr__(self) -> str:
        if self._fork is None:
            return "nothing held yet"
        share = self.bytes_held / self.bytes_full
        return (
            f"{self.bytes_held:,} of {self.bytes_full:,} bytes held ({share:.1%}): "
            f"{self.tokens_kept:.1f} of {self.tokens_context} tokens per KV head"
        )


@contextmanager
def compress(
    model: Any,
    method: str | Method = "vector",
    budget: str | float | int = 0.1,
    *,
    fed: int = 1,
    tokenizer: Any = None,
    dtype: str | None = None,
    **options: Any,
) -> Iterator[Held]:
    """Meanwhile `model.generate(input_ids, ...)` answers over a compressed cache of its prompt.

        with kvbench.compress(model, "snapkv", budget=0.25, window=32) as held:
            ids = model.generate(prompt, max_new_tokens=64)
        print(held.bytes_held, held.bytes_full)

    `model` is a transformers model of a supported family, and afterwards as it was. Each call reads its prompt once,
    exactly, compresses it but for the last `fed` tokens with `method` (a name, with its options as keywords, or a
    Method) to `budget`, feeds those, and decodes. A question that the method must not see is what is fed: give its
    length. Greedy or sampled; one sequence at a time, without padding.

    The cache is held in `dtype`: by default in that of the weights, or what `kvbench.load` was told. `tokenizer` is
    needed where a method has to be fitted first (VECTOR's maps) and the model's own is not to be found.
    """
    if fed < 1:
        raise UsageError(f"fed={fed}: at least the prompt's last token is fed after compression")
    chosen, bound = _method(method, options), Budget.parse(budget)
    held = Held()
    with borrowed(model, _dtype(model, dtype)) as network:
        given = _model(model, network, chosen, tokenizer)
        compressor = Compressor(Cell(given.config, chosen, bound, task=None), given)

        def start(ids: Int[Tensor, " tokens"]) -> tuple[Step, Float[Tensor, " vocabulary"]]:
            if len(ids) <= fed:
                raise UsageError(f"a prompt of {len(ids)} tokens leaves nothing to compress: the last {fed} are fed")
            held._fork = None  # lets go of the call before
            context = compressor.read(ids[:-fed])
            cache = compressor.compress(context)
            held._facts, held._fork = compressor.describe(context, cache), Fork(cache, chosen)
            fork = held._fork

            def step(new: Int[Tensor, " new"]) -> Float[Tensor, " vocabulary"]:
                return feed(network, [fork], new[None], last_only=True)[0, -1]

            return step, step(ids[-fed:])

        with generating(network, start):
            yield held


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any


def load(name: str, **options: Any) -> Loaded:
    """(model, tokenizer) of transformers: of a model as `model=` names it, a hub id, a local folder, or `embedded:...`.

        model, tokenizer = kvbench.load("embedded:smollm2-135m-q4_1")

    The options are those of `model.`: `dtype` (of the cache: bfloat16), `compute` (of the weights), `device`,
    `revision`. What methods fit for this model is then shared with runs of the command line.
    """
    if name in choices("models"):
        config = build("model", composed({"model": name}).model)
    else:
        config = ModelConfig(name.rpartition(":")[2], name)
    for option in options:
        known("option", option, vars(config))
    config = replace(config, **options)
    model, tokenizer, facts = pretrained(config)
    _LOADED[model] = _Origin(config, facts["weights"], _fingerprint(model))
    return Loaded(model, tokenizer)


@dataclass(frozen=True)
class _Origin:
    """Where a model that `load` has made comes from."""

    config: ModelConfig
    weights: str
    fingerprint: str


_LOADED: WeakKeyDictionary[Any, _Origin] = WeakKeyDictionary()


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise UsageError(f"{', '.join(options)}: options go with a method's name; this one is made already")
        return method
    node = composed({"method": method}).method
    try:
        node.merge_with(options)
    except OmegaConfBaseException as error:
        raise UsageError(one_line(error)) from error
    return build("method", node)


def _dtype(model: Any, dtype: str | None) -> torch.dtype | None:
    if dtype is None:
        return getattr(torch, _LOADED[model].config.dtype) if model in _LOADED else None
    return getattr(torch, known("dtype", dtype, DTYPES))


def _model(model: Any, network: Network, method: Method, tokenizer: Any) -> Model:
    """A user's model as methods, and what is fitted for them, know it."""
    path = str(model.name_or_path)
    config, weights = ModelConfig(Path(path).name or model.config.model_type, path), ""
    if method.calibrations:
        weights, origin = _fingerprint(model), _LOADED.get(model)
        if origin and origin.fingerprint == weights:  # as it was loaded
            config, weights = origin.config, origin.weights
    config = replace(config, dtype=str(network.dtype).removeprefix("torch."))
    facts = {"weights": weights, "device": str(network.device), "torch_threads": torch.get_num_threads()}
    return Model(config, network, _LateWriter(lambda: tokenizer or _tokenizer(path)), end_ids(model), facts)


class _LateWriter(Writer):
    """A writer whose tokenizer is looked for when it is first asked: most methods never do."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> Any:  # of what is not there yet
        tokenizer = self._find()
        super().__init__(tokenizer, chat=bool(tokenizer.chat_template))
        return getattr(self, name)


def _tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError("this method is fitted to the model's text first: give compress the tokenizer=") from error


def _fingerprint(model: Any) -> str:
    """A hash of some elements of every weight: it changes when they do, and costs next to nothing."""
    some = [x.detach().flatten()[:: max(1, x.numel() // 256)].float().cpu() for x in model.parameters()]
    return hashlib.sha256(torch.cat(some).numpy().tobytes()).hexdigest()[:16]
