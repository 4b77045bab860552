"""The only file that knows transformers' cache and attention internals (transformers 5.23).

A model is run with one `LayerAttention` per layer. It reaches the model as a cache layer whose `update` returns a view
instead of tensors, and the attention function registered under `kvbench_tiers` calls it back with the query. Whatever
this file does not implement it refuses; a keyword that is ignored is a wrong number that nobody sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvbench.errors import UsageError

ATTENTION = "kvbench_tiers"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_HARMLESS = {"position_ids", "use_cache"}  # keywords of the attention call that change nothing here


@runtime_checkable
class LayerAttention(Protocol):
    """What stands in for one layer's cache: it keeps the new rows as it likes and attends for their queries."""

    def attend(
        self,
        query: Float[Tensor, "batch heads new dim"],
        key: Float[Tensor, "batch kv_heads new dim"],
        value: Float[Tensor, "batch kv_heads new dim"],
        scale: float,
    ) -> Float[Tensor, "batch heads new dim"]: ...


@dataclass(frozen=True)
class _View:
    """Travels through the model in place of the cached keys and values."""

    attention: LayerAttention
    key: Tensor
    value: Tensor


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, attention: LayerAttention) -> None:
        super().__init__()
        self._attention = attention

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        view = _View(self._attention, key_states, value_states)
        return view, view

    # Positions and masks are always given, so the model never asks; answering would hide a wrong call.
    def get_seq_length(self) -> int:
        raise NotImplementedError

    get_max_length = get_mask_sizes = lazy_initialization = get_seq_length  # type: ignore[assignment]


def _tiers(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: (batch, heads, new, dim) -> (batch, new, heads, dim)."""
    scale, dropout = kwargs.pop("scaling"), kwargs.pop("dropout", 0.0)
    odd = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if odd or dropout or attention_mask is not None:
        what = ", ".join(odd) or ("dropout" if dropout else "an attention mask")
        raise UsageError(f"this model's attention uses {what}, which kvbench does not implement")
    return key.attention.attend(query, key.key, key.value, scale).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _tiers)


def check_supported(config: PretrainedConfig) -> None:
    """Raises UsageError for models whose attention is not plain causal attention with rotary positions."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    reasons = {
        f"the family '{config.model_type}'": config.model_type not in FAMILIES,
        "a sliding window": getattr(config, "sliding_window", None) is not None,
        ", ".join(sorted(kinds - {"full_attention"})): kinds != {"full_attention"},
        f"'{rope}' rotary positions, which change with the length read": rope in ("dynamic", "longrope"),
        "softcapped logits": getattr(config, "attn_logit_softcapping", None) is not None,
    }
    for reason, refused in reasons.items():
        if refused:
            raise UsageError(f"kvbench does not implement {reason}; it runs {', '.join(FAMILIES)} with full attention")


class Network:
    """A causal language model of transformers, run layer by layer through `LayerAttention`s.

    `dtype` is the cache's: keys and values are held, and counted, in it. The layers compute in the weights' own.
    Layers may be on different devices (`placement`), hidden states moved between them by accelerate's hooks: a layer's
    cache is where the layer is; `device`, that of the embeddings, has the token ids, and the logits come back to it.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        check_supported(model.config)
        model.set_attn_implementation(ATTENTION)
        model.eval()
        self._model: Any = model
        self._body: Any = model.model
        config: Any = model.config
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vocabulary: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        if any(x.is_meta for x in model.parameters()):
            raise UsageError("kvbench does not implement models whose weights are offloaded to the host or the disk")
        self.device, self.dtype = model.device, dtype or model.dtype
        self.placement = tuple(next(layer.parameters()).device for layer in self._body.layers)
        self.passed = 0  # tokens sent through a layer so far, summed over the layers: only ever counts up

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where it is, each device once."""
        return tuple(dict.fromkeys((self.device, *self.placement)))

    def gather(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """What each layer made, on one device: free where there is only one."""
        return [x.to(self.device) for x in parts]

    def row_bytes(self) -> int:
        """Bytes of one exact token in all layers and KV heads."""
        return 2 * self.layers * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def embeddings(self) -> Float[Tensor, "vocabulary hidden"]:
        """The input embedding table: the model's own weights."""
        return self._body.embed_tokens.weight

    def output_projection(self, layer: int) -> Float[Tensor, "heads dim hidden"]:
        """What a layer's attention output goes through, query head by query head; a view of the model's own weights."""
        return self._body.layers[layer].self_attn.o_proj.weight.mT.unflatten(0, (self.heads, self.dim))

    def rope(self, position: Int[Tensor, ...]) -> tuple[Float[Tensor, "... dim"], Float[Tensor, "... dim"]]:
        """(cos, sin) of the rotary embedding, in float32, scaled as the model scales them; where the positions are."""
        cos, sin = self._body.rotary_emb(torch.empty(0, device=position.device), position[None])
        return cos[0].to(position.device), sin[0].to(position.device)

    def hidden(
        self, ids: Int[Tensor, "batch new"], position: Int[Tensor, "batch new"], layers: Sequence[LayerAttention]
    ) -> Float[Tensor, "batch new hidden"]:
        """The last hidden states of new tokens at given positions."""
        self.passed += ids.numel() * self.layers
        cache = Cache(layers=[_Layer(x) for x in layers])
        out = self._body(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
        return out.last_hidden_state

    def logits(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... vocabulary"]:
        return self._model.lm_head(hidden).to(self.device)

    def embed(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens hidden"]:
        return self._body.embed_tokens(ids)

    def run_layer(
        self,
        index: int,
        hidden: Float[Tensor, "tokens hidden"],
        position: Int[Tensor, " tokens"],
        attention: LayerAttention,
    ) -> Float[Tensor, "tokens hidden"]:
        """One decoder layer over hidden states, for methods that read the context their own way."""
        self.passed += len(hidden)
        cache = Cache(layers=[_Layer(attention)] * self.layers)
        embeddings = self._body.rotary_emb(hidden[None], position_ids=position[None])
        return self._body.layers[index](
            hidden[None],
            attention_mask=None,
            position_ids=position[None],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=embeddings,
        )[0]


# -- a model of the user's own, around `generate` ----------------------------------------------------------------------

Step = Callable[[Int[Tensor, " new"]], Float[Tensor, " vocabulary"]]  # reads tokens: the logits after the last of them
Start = Callable[[Int[Tensor, " tokens"]], tuple[Step, Float[Tensor, " vocabulary"]]]  # reads a prompt


@contextmanager
def borrowed(model: Any, dtype: torch.dtype | None = None) -> Iterator[Network]:
    """A user's model as a network; afterwards it is as it was."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise UsageError(f"{type(model).__name__} is no causal language model of transformers")
    attention, training = model.config._attn_implementation, [x for x in model.modules() if x.training]
    try:
        yield Network(model, dtype)
    finally:
        model.set_attn_implementation(attention)
        for module in training:
            module.training = True


class _Going(Cache):
    """What `generate` carries along in place of a cache: how it goes on, and how many tokens were read."""

    def __init__(self, step: Step, seen: int) -> None:
        super().__init__(layers=[])
        self.step, self.seen = step, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def crop(self, *args: Any) -> None:
        raise _not_implemented("assisted generation")


@contextmanager
def generating(network: Network, start: Start) -> Iterator[None]:
    """Meanwhile the model's `generate` reads its prompt by `start`, and what it says by the step that this returns."""
    model = network._model

    @functools.wraps(model.forward)
    @torch.no_grad()
    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if input_ids is None or inputs_embeds is not None:
            raise _not_implemented("inputs_embeds")
        if len(input_ids) > 1:
            raise _not_implemented("batches, beams or several answers to a prompt")
        cache, ids = past_key_values, input_ids[0].to(network.device)
        if cache is None:
            raise _not_implemented("use_cache=False")
        fresh = type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length()
        if not fresh and not isinstance(cache, _Going):
            raise _not_implemented("a cache of your own")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise _not_implemented("padding (an attention mask with zeros)")
        if odd := [name for name, given in kwargs.items() if given is not None and given is not False]:
            raise _not_implemented(", ".join(odd))
        if not isinstance(logits_to_keep, int) or logits_to_keep != 1:
            raise _not_implemented("calls of the model itself, or assisted generation")
        if not fresh:
            if len(ids) > 1:
                raise _not_implemented("a prompt in chunks, or one that goes on after an earlier call")
            logits = cache.step(ids)
        else:
            if position_ids is not None and position_ids[0].tolist() != list(range(len(ids))):
                raise _not_implemented("positions of your own")
            step, logits = start(ids)
            cache = _Going(step, 0)
        cache.seen += len(ids)
        return CausalLMOutputWithPast(logits=logits[None, None], past_key_values=cache)

    before = vars(model).get("forward")  # accelerate may have put one there
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def _not_implemented(what: str) -> UsageError:
    return UsageError(
        f"kvbench.compress does not implement {what}: it runs model.generate(input_ids, ...) of one sequence, greedy "
        "or sampled"
    )
