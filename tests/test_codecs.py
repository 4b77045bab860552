"""Properties of codecs and of the layout of rows."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows
from kvbench.cache.codecs.exact import Exact
from kvbench.cache.codecs.from_key import FromKey
from kvbench.cache.codecs.quant import Quant, pack, unpack
from kvbench.cache.layout import Layout
from kvbench.cache.packed import nbytes
from kvbench.cache.rope import unrotate

DIM = 16
COUNTS = st.lists(st.integers(0, 9), min_size=2, max_size=2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def from_key(all_heads: bool = False, tokens: bool = True, intercept: bool = True) -> FromKey:
    network = tiny_network()
    features = DIM * (2 if all_heads else 1) + (64 if tokens else 0)
    table = network.embeddings if tokens else None
    weight, bias = random(2, features, DIM), random(2, DIM, seed=1)
    return FromKey(weight.bfloat16(), bias.bfloat16(), network.rope, table, intercept, all_heads)


def rows_of(counts: list[int], seed: int = 0, shared: bool = False) -> Rows:
    layout = Layout(tuple(counts), shared)
    draw = torch.Generator().manual_seed(seed)
    each = [torch.randperm(100, generator=draw)[:n].sort().values for n in counts]
    position = torch.cat([each[0]] * len(counts) if shared else each)
    return Rows(layout, position, torch.randint(0, 256, (100,), generator=draw)[position], random(layout.rows, DIM))


@given(COUNTS)
def test_pad_and_flatten_are_inverse(counts: list[int]) -> None:
    layout = Layout(tuple(counts))
    x = random(layout.rows, 3)
    assert torch.equal(layout.flatten(layout.pad(x)), x)
    assert layout.heads(x.device).bincount(minlength=2).tolist() == counts


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 5), st.integers(0, 2**31))
def test_bits_are_packed_without_loss(bits: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.nbytes == rows * 16 * bits // 8
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", [Exact(), Quant(8), Quant(4), Quant(2, channels=8), from_key()])
@settings(deadline=None, max_examples=25)
@given(counts=COUNTS)
def test_bytes_are_as_the_formula_says(codec: Codec, dtype: torch.dtype, counts: list[int]) -> None:
    rows = rows_of(counts)
    x = random(sum(counts), DIM, seed=2).to(dtype)
    fixed = codec.fit(x, rows)
    stored = codec.encode(x, rows, fixed)
    assert nbytes(stored.values()) == sum(codec.group_bytes(DIM, dtype)) * sum(counts) // codec.group
    assert nbytes(fixed.values()) == codec.fixed_bytes(2, DIM, dtype)
    decoded = codec.decode(stored, rows, fixed, dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype


@given(st.sampled_from([2, 4, 8]), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_quantisation_errs_by_half_a_step(bits: int, spread: float, centre: float) -> None:
    x = random(5, DIM) * spread + centre
    codec = Quant(bits)
    rows = Rows(Layout((5, 0)))
    back = codec.decode(codec.encode(x, rows, {}), rows, {}, torch.float32)
    width = x.amax(1) - x.amin(1)
    half_step = width / (2**bits - 1) / 2
    rounding = (x.abs().amax(1) + width) * 2**-10  # minimum and step are float16
    assert ((back - x).abs().amax(1) <= half_step * 1.01 + rounding).all()


def test_a_constant_row_survives_quantisation() -> None:
    codec, rows = Quant(4), Rows(Layout((1, 1)))
    x = torch.full((2, DIM), 0.5)
    assert torch.equal(codec.decode(codec.encode(x, rows, {}), rows, {}, torch.float32), x)


@pytest.mark.parametrize("position", [0, 1, 77, 5000])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_unrotate_undoes_the_models_own_rotation(family: str, position: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    network = tiny_network(family)
    cos, sin = network.rope(torch.tensor([position]))
    key = random(1, 1, 1, DIM)
    rotated = apply_rotary_pos_emb(key, key, cos[None], sin[None])[1]
    torch.testing.assert_close(unrotate(rotated[0, 0], cos, sin), key[0, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("all_heads", "tokens"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize("counts", [[7, 7], [3, 9]])
def test_the_linear_shortcut_equals_explicit_values(all_heads: bool, tokens: bool, counts: list[int]) -> None:
    if all_heads and counts[0] != counts[1]:
        pytest.skip("a map over all heads has the same rows in every head")
    codec = from_key(all_heads, tokens)
    rows = rows_of(counts, shared=all_heads)
    x = random(sum(counts), DIM, seed=3)
    fixed = codec.fit(x, rows)
    weights = random(2, 4, max(counts)).softmax(-1) * rows.layout.mask(x.device)[:, None]
    explicit = weights @ rows.layout.pad(codec.decode({}, rows, fixed, torch.float32))
    torch.testing.assert_close(codec.mix(weights, {}, rows, fixed), explicit, atol=1e-5, rtol=1e-5)


def test_the_intercept_is_the_mean_error_of_the_stored_rows() -> None:
    codec, rows = from_key(), rows_of([4, 6])
    x = random(10, DIM, seed=5)
    fixed = codec.fit(x, rows)
    error = x - codec.decode({}, rows, fixed, torch.float32)
    torch.testing.assert_close(error[:4].mean(0), torch.zeros(DIM), atol=1e-4, rtol=0)
    torch.testing.assert_close(error[4:].mean(0), torch.zeros(DIM), atol=1e-4, rtol=0)


def test_a_slice_pays_for_the_tensor_it_keeps_alive() -> None:
    big = torch.zeros(1000, 8)
    assert nbytes([big[:1], big[5:7]]) == big.nbytes
    assert nbytes([big[:1].clone()]) == 32
