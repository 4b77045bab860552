"""The seam to transformers: what is refused, what is reproduced."""

from __future__ import annotations

import copy
from typing import Any

import checks
import pytest
import torch
from conftest import ids_of, tiny_network
from test_toys import AdaKV, Masked
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench.budget import Allowance
from kvbench.cache.fork import Fork
from kvbench.cache.hf import ATTENTION, FAMILIES, Network, _Layer, check_supported
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed, greedy
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.plan import keep_all
from kvbench.prefill import Reader, Seen, read_exactly

TOKENS, NEW = 70, 12
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}
# head_dim is not hidden / heads in any of them
ODD: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "llama one KV head": {"num_key_value_heads": 1, "head_dim": 8},
    "llama without groups": {"num_key_value_heads": 4, "head_dim": 24},
    "llama 3 rope": {"head_dim": 32, "rope_parameters": LLAMA3_ROPE},
    "llama yarn": {"head_dim": 8, "rope_parameters": YARN},
    "qwen2": {"head_dim": 32},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 8},
}


def odd_network(name: str, dtype: torch.dtype = torch.float32) -> Network:
    return tiny_network(name.split()[0], dtype, **ODD[name])


def stock_of(network: Network, attention: str = "sdpa") -> Any:
    """The same weights in stock transformers."""
    config = copy.deepcopy(network._model.config)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=network._model.dtype).eval()
    stock.load_state_dict(network._model.state_dict())
    return stock


def full_cache(network: Network, ids: Tensor, chunk: int = 65536) -> CompressedCache:
    seen = read_exactly(network, ids, chunk=chunk)
    return CompressedCache.pack(keep_all(seen), seen)


# -- refused -----------------------------------------------------------------------------------------------------------

OTHERS = [
    "gemma3_text",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v2",
    "phi3",
    "cohere2",
    "gpt2",
    "mamba",
    "llama4_text",
]


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused(family: str) -> None:
    assert family not in FAMILIES
    with pytest.raises(UsageError, match=f"does not implement the family '{family}'"):
        check_supported(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "a sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding"),
        ("llama", {"attn_logit_softcapping": 50.0}, "softcapped logits"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 128}, "longrope"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
    ids=str,
)
def test_other_attention_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    tiny_network(family)  # as it is otherwise, it is supported
    with pytest.raises(UsageError, match=reason):
        tiny_network(family, **changes)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_switched_off_is_none(family: str) -> None:
    tiny_network(family, use_sliding_window=False, sliding_window=64)


@pytest.mark.parametrize(
    "keyword",
    [
        {"sliding_window": 64},
        {"softcap": 50.0},
        {"s_aux": torch.zeros(4)},
        {"dropout": 0.1},
        {"cu_seq_lens_q": torch.tensor([0, 3])},
        {"is_causal": False},
        {"num_logits_to_keep": 1},
        {"attention_mask": torch.zeros(1, 1, 3, 3)},
    ],
    ids=lambda keyword: next(iter(keyword)),
)
def test_keywords_that_change_attention_are_refused(keyword: dict[str, Any]) -> None:
    network = tiny_network()
    attention = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    given: dict[str, Any] = {"attention_mask": None, "scaling": 0.25} | keyword
    with pytest.raises(UsageError, match="which kvbench does not implement"):
        attention(network._body.layers[0].self_attn, torch.zeros(1, 4, 3, 16), None, None, **given)


def test_a_mask_or_keyword_given_to_the_model_is_refused() -> None:
    network = tiny_network()
    ids, position = ids_of(network, 5)[None], torch.arange(5)[None]
    whole = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    for given in ({"attention_mask": whole}, {"s_aux": torch.zeros(4)}, {"softcap": 30.0}):
        cache = Cache(layers=[_Layer(x) for x in Reader(network, ids[0]).recorders])
        with torch.inference_mode(), pytest.raises(UsageError, match="does not implement"):
            network._body(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, **given)


def test_a_model_that_asks_the_cache_for_its_length_is_refused() -> None:
    """It would make its own positions or mask out of the answer."""
    network = tiny_network()
    ids = ids_of(network, 5)[None]
    cache = Cache(layers=[_Layer(x) for x in Reader(network, ids[0]).recorders])
    with torch.inference_mode(), pytest.raises(NotImplementedError):
        network._body(input_ids=ids, past_key_values=cache, use_cache=True)


# -- reproduced --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_rope_is_the_models_own(name: str) -> None:
    network = odd_network(name)
    position = torch.tensor([0, 1, 2, 63, 64, 65, 1000, 8191])
    cos, sin = network.rope(position)
    expected = stock_of(network).model.rotary_emb(torch.zeros(1, 1, 1), position[None])
    assert torch.equal(cos, expected[0][0])
    assert torch.equal(sin, expected[1][0])
    assert torch.equal(cos[2:5], network.rope(position[2:5])[0])  # of a position alone, whatever else is asked
    if "rope_parameters" not in ODD[name]:
        theta = network._model.config.rope_parameters["rope_theta"]
        angle = position[:, None] * theta ** (-torch.arange(0, network.dim, 2) / network.dim)
        torch.testing.assert_close(cos, angle.cos().repeat(1, 2), atol=2e-3, rtol=0)  # float32 angles up to 8191


def test_rope_is_in_float32_for_any_model() -> None:
    for cos in odd_network("llama", torch.bfloat16).rope(torch.arange(300)):
        assert cos.dtype == torch.float32
    exact = tiny_network().rope(torch.arange(300))
    half = tiny_network(dtype=torch.bfloat16).rope(torch.arange(300))
    assert all(torch.equal(a, b) for a, b in zip(exact, half, strict=True))


@pytest.mark.parametrize("name", ODD)
def test_every_family_reproduces_stock_transformers(name: str) -> None:
    network = odd_network(name)
    stock = stock_of(network)
    ids = ids_of(network, TOKENS + NEW)
    assert network.row_bytes() == 2 * 2 * network.kv_heads * network.dim * 4
    with torch.inference_mode():
        past = stock(ids[None, :TOKENS], use_cache=True).past_key_values
        for seen, layer in zip(read_exactly(network, ids[:TOKENS]).layers, past.layers, strict=True):
            torch.testing.assert_close(seen.key, layer.keys[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(seen.value, layer.values[0], atol=1e-4, rtol=0)
        fork = Fork(full_cache(network, ids[:TOKENS]), Method())
        logits = feed(network, [fork], ids[None, TOKENS:])
        torch.testing.assert_close(logits, stock(ids[None]).logits[:, TOKENS:], atol=1e-4, rtol=0)
        [answer] = greedy(network, [fork], logits[:, -1], lambda _: False, 8)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        expected = stock.generate(
            ids[None], attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert answer == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("chunk", [1, 16, 23, TOKENS - 1, TOKENS])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_reading_in_chunks_sees_the_same_rows(name: str, chunk: int) -> None:
    network = odd_network(name)
    ids = ids_of(network, TOKENS)
    with torch.inference_mode():
        whole, parts = read_exactly(network, ids), read_exactly(network, ids, chunk=chunk)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(b.key, a.key, atol=2e-5, rtol=0)
        torch.testing.assert_close(b.value, a.value, atol=2e-5, rtol=0)
        assert torch.equal(a.position, b.position)


@torch.inference_mode()
def ragged(network: Network) -> tuple[Seen, AdaKV, CompressedCache, Masked]:
    """A cache whose heads hold different numbers of rows, and the mask over the full cache that it stands for."""
    method = AdaKV()
    seen = read_exactly(network, ids_of(network, TOKENS))
    plan = method.plan(seen, Allowance(int(0.4 * network.row_bytes() * TOKENS)))
    return seen, method, CompressedCache.pack(plan, seen), Masked(tuple(layer.route for layer in plan.layers))


@pytest.mark.parametrize("name", ["llama", "llama without groups", "qwen2", "qwen3", "mistral"])
def test_ragged_heads_read_a_block_as_token_by_token(name: str) -> None:
    network = odd_network(name)
    seen, method, cache, masked = ragged(network)
    assert any(len(set(slab.layout.counts)) > 1 for layer in cache.layers for slab in layer.slabs)
    checks.block_equals_single(network, cache, method)
    new = ids_of(network, NEW, seed=7)[None]
    with torch.inference_mode():
        full = CompressedCache.pack(masked.plan(seen, Allowance(0)), seen)
        expected = feed(network, [Fork(full, masked)], new)
        torch.testing.assert_close(feed(network, [Fork(cache, method)], new), expected, atol=1e-4, rtol=0)


def test_a_question_longer_than_a_block_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    network = odd_network("llama")
    _, method, cache, _ = ragged(network)
    new = ids_of(network, NEW, seed=7)[None]
    with torch.inference_mode():
        whole = feed(network, [Fork(cache, method)], new)
        monkeypatch.setattr("kvbench.decode.BLOCK", 5)
        blocks = feed(network, [Fork(cache, method)], new)
        last = feed(network, [Fork(cache, method)], new, last_only=True)
    torch.testing.assert_close(blocks, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(last, blocks[:, -1:], atol=1e-5, rtol=0)


# -- a cache in bfloat16 under layers in float32 -----------------------------------------------------------------------


class Rounding(DynamicCache):
    """Stock transformers with a cache that holds bfloat16: the context is read exactly and then held rounded; a new
    token attends over rounded rows, its own included."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first = layer_idx >= len(self.layers) or self.layers[layer_idx].get_seq_length() == 0
        held = super().update(key.bfloat16().float(), value.bfloat16().float(), layer_idx, *args, **kwargs)
        return (key, value) if first else held


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_bfloat16_cache_is_stock_with_rounded_rows(name: str) -> None:
    network = Network(odd_network(name)._model, torch.bfloat16)
    stock = stock_of(network)
    ids = ids_of(network, TOKENS + NEW)
    cache, rounded = full_cache(network, ids[:TOKENS]), Rounding()
    assert cache.nbytes == network.row_bytes() * TOKENS == 2 * 2 * network.kv_heads * network.dim * 2 * TOKENS
    with torch.inference_mode():
        stock(ids[None, :TOKENS], past_key_values=rounded, use_cache=True)
        # Rows next to a tie may round to either side; hardly any does.
        for packed, layer in zip(cache.layers, rounded.layers, strict=True):
            dense = packed.dense()
            assert dense.key.dtype == torch.bfloat16
            assert ((dense.key.float() == layer.keys[0]).float().mean()) > 0.99
            assert ((dense.value.float() == layer.values[0]).float().mean()) > 0.99
            layer.keys, layer.values = dense.key.float()[None], dense.value.float()[None]
        expected = stock(ids[None, TOKENS:], past_key_values=rounded, use_cache=True).logits
        exact = stock(ids[None]).logits[:, TOKENS:]
        fork = Fork(cache, Method())
        logits = feed(network, [fork], ids[None, TOKENS:])
    assert logits.dtype == torch.float32
    wrong, rounding = (logits - expected).abs().mean(), (exact - expected).abs().mean()
    assert wrong < 0.02 * rounding  # far below the effect of rounding itself
    assert fork.tail_bytes == network.row_bytes() * NEW
