"""Methods with an own prefill: what they keep and pass on, against naive references, and what reading costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import byte_tokenizer, ids_of, tiny_network
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvbench import loop, plugins
from kvbench.artefact import Calibration
from kvbench.budget import Allowance, Budget
from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.compressor import Compressor
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import keep_all
from kvbench.prefill import Reader, Seen, read_exactly
from kvbench.prompt import Writer
from kvbench.store import read_cell
from kvbench.task import Context, Example, Task
from kvbench.toolbox.windows import then_window

TOKENS, LAYERS = 120, 4
OWN = ["epicache", "fastkv", "speckv_draft", "specpc"]


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network(num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def build(name: str, **options: Any) -> Method:
    return plugins.build_method(name, **options)


def limit(network: Network, rows: int, metadata: int = 0) -> Allowance:
    return Allowance(network.row_bytes() * rows + metadata)


def prefill(method: Method, reader: Reader, budget: Allowance) -> CompressedCache:
    cache = method.prefill(reader, budget)
    reader.close()
    return cache


def exact(network: Network, ids: Tensor) -> Seen:
    return read_exactly(network, ids)


def full(network: Network, ids: Tensor) -> CompressedCache:
    seen = exact(network, ids)
    return CompressedCache.pack(keep_all(seen), seen)


def stock(network: Network) -> Any:
    """The same weights in transformers' own model."""
    config: Any = copy.deepcopy(network._model.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(network._model.state_dict())
    return model


def attentions(network: Network, ids: Tensor) -> list[Tensor]:
    """Of each layer (heads, tokens, tokens), by transformers."""
    return [x[0] for x in stock(network)(ids[None], output_attentions=True).attentions]


def held(cache: CompressedCache, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """The (keys, values) that a KV head holds."""
    keys, values = [], []
    for slab in cache.layers[layer].slabs:
        key, value = slab.decode(None, torch.float32)
        keys.append(key.split(slab.layout.counts)[head])
        values.append(value.split(slab.layout.counts)[head])
    return torch.cat(keys), torch.cat(values)


def kept(cache: CompressedCache, layer: int, head: int, every: Tensor) -> list[int]:
    """Which of the rows `every` (KV heads, tokens, dim) a KV head holds, in the order in which it does."""
    far, found = (held(cache, layer, head)[0][:, None] - every[head]).norm(dim=-1).min(1)
    assert (far < 1e-3).all()
    return found.tolist()


def best(scores: Sequence[float], number: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:number])


# -- FastKV ------------------------------------------------------------------------------------------------------------


class Plain:
    """Attention of one layer, query by query: what a naive reference runs the layers with."""

    def __init__(self) -> None:
        self.query = self.key = self.value = torch.zeros(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.query, self.key, self.value = query[0], key[0], value[0]
        out = torch.zeros_like(query)
        for h in range(query.shape[1]):
            g = h * key.shape[1] // query.shape[1]
            for i in range(query.shape[2]):
                out[0, h, i] = (query[0, h, i] @ key[0, g, : i + 1].T * scale).softmax(-1) @ value[0, g, : i + 1]
        return out


def fastkv_scores(layer: Plain, window: int, pool: int, scale: float) -> list[list[float]]:
    """Of each KV head, the tokens before the window."""
    heads, tokens, _ = layer.query.shape
    group = heads // len(layer.key)
    found = []
    for g in range(len(layer.key)):
        paid = [0.0] * (tokens - window)
        for h in range(g * group, (g + 1) * group):
            for i in range(tokens - window, tokens):
                row = (layer.query[h, i] @ layer.key[g, : i + 1].T * scale).softmax(-1)
                for j in range(tokens - window):
                    paid[j] += float(row[j])
        side = pool // 2
        found.append([sum(paid[max(j - side, 0) : j + side + 1]) / pool for j in range(len(paid))])
    return found


@pytest.mark.parametrize(("share", "passed", "layer"), [(0.25, 0.5, None), (0.15, 0.2, 0), (0.4, 0.2, 2)])
def test_fastkv_keeps_and_passes_on_what_a_naive_reading_does(
    network: Network, share: float, passed: float, layer: int | None
) -> None:
    ids, window, pool = ids_of(network, TOKENS), 8, 7
    rows = int(share * TOKENS)
    method = build("fastkv", passed=passed, layer=layer)
    cache = prefill(method, Reader(network, ids), limit(network, rows))
    turn = LAYERS // 2 - 1 if layer is None else layer
    hidden, position = network.embed(ids), torch.arange(TOKENS)
    whole = exact(network, ids)
    for i in range(LAYERS):
        plain = Plain()
        hidden = network.run_layer(i, hidden, position, plain)
        scores = fastkv_scores(plain, window, pool, network.dim**-0.5)
        last = set(range(len(position) - window, len(position)))
        for g in range(network.kv_heads):
            found = kept(cache, i, g, plain.key)
            assert len(found) == rows
            assert set(found) == best(scores[g], rows - window) | last  # the window by index, the others by score
            assert torch.allclose(held(cache, i, g)[1], plain.value[g, found], atol=1e-4)
            if i <= turn:  # up to there the layers are the full model's
                assert torch.allclose(held(cache, i, g)[0], whole.layers[i].key[g, found], atol=1e-6)
        if i == turn:
            number = max(int(passed * TOKENS), rows)
            total = [sum(column) for column in zip(*scores, strict=True)]
            on = torch.tensor(sorted(best(total, number - window) | last))
            hidden, position = hidden[on], position[on]
    assert cache.next_position == TOKENS


@pytest.mark.parametrize("method", ["fastkv", "speckv_draft", "specpc", "epicache"])
def test_with_room_for_all_it_is_the_full_cache(network: Network, method: str) -> None:
    ids, new = ids_of(network, TOKENS), ids_of(network, 9, seed=2)[None]
    options = {"passed": 1.0} if method == "fastkv" else {}
    cache = prefill(build(method, **options), Reader(network, ids), limit(network, TOKENS + 5))
    assert cache.nbytes == network.row_bytes() * TOKENS
    expected = feed(network, [Fork(full(network, ids), Method())], new)
    torch.testing.assert_close(feed(network, [Fork(cache, Method())], new), expected, atol=5e-5, rtol=0)


def test_fastkv_with_all_tokens_passed_on_is_snapkv_summed_over_the_group(network: Network) -> None:
    ids = ids_of(network, TOKENS)
    cache = prefill(build("fastkv", passed=1.0, pool=1), Reader(network, ids), limit(network, 30))
    snapkv = build("snapkv", window=8, pool=1)
    seen = read_exactly(network, ids, snapkv.needs)
    expected = CompressedCache.pack(snapkv.plan(seen, limit(network, 30)), seen)
    for a, b in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(a.dense().key, b.dense().key)


def test_fastkv_lets_go_of_a_layer_once_it_has_run(network: Network) -> None:
    ids, rows = ids_of(network, TOKENS), 12
    reader = Reader(network, ids)
    prefill(build("fastkv", passed=0.25), reader, limit(network, rows))
    row = network.row_bytes() // LAYERS
    read = [TOKENS, TOKENS, 30, 30]
    assert reader.costs.bytes_prefill == row * max(rows * (i + 1) + tokens for i, tokens in enumerate(read))
    assert reader.costs.bytes_prefill < network.row_bytes() * TOKENS / 2
    assert reader.costs.tokens_prefill == sum(read) / LAYERS
    assert reader.costs.tokens_draft == 0


def test_then_window_puts_the_window_last_and_its_end_first() -> None:
    scores = then_window(torch.tensor([[0.0, 0.5]]), 3)
    assert scores.argsort(descending=True).tolist() == [[1, 0, 4, 3, 2]]


# -- SpecKV with a draft -----------------------------------------------------------------------------------------------


def continuation(network: Network, ids: Tensor, new: int) -> Tensor:
    """Greedy, by transformers."""
    found = stock(network).generate(
        ids[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
    )
    return found[0, len(ids) :]


@pytest.mark.parametrize(("ahead", "window", "pool"), [(6, 8, 7), (70, 3, 1), (0, 8, 5)])
def test_speckv_keeps_the_most_attended_before_the_window(network: Network, ahead: int, window: int, pool: int) -> None:
    ids, rows = ids_of(network, TOKENS), 30
    method = build("speckv_draft", ahead=ahead, window=window, pool=pool)
    cache = prefill(method, Reader(network, ids), limit(network, rows))
    every = torch.cat([ids, continuation(network, ids, ahead)]) if ahead else ids
    whole = exact(network, every)
    before, side = TOKENS - window - 1, pool // 2
    for i, weights in enumerate(attentions(network, every)):
        group = len(weights) // network.kv_heads
        for g in range(network.kv_heads):
            most = weights[g * group : (g + 1) * group, before:, :before].amax((0, 1)).tolist()
            pooled = [max(most[max(j - side, 0) : j + side + 1]) for j in range(before)]
            found = kept(cache, i, g, whole.layers[i].key)
            assert len(found) == rows
            assert set(range(before, TOKENS)) <= set(found)
            assert max(found) < TOKENS  # none of the draft's tokens
            expected = best(pooled, rows - window - 1)
            worst = min(pooled[j] for j in expected)
            assert {j for j in found if j < before and pooled[j] > worst + 1e-6} == {
                j for j in expected if pooled[j] > worst + 1e-6
            }
            assert min(pooled[j] for j in found if j < before) >= worst - 1e-6  # equal maxima may fall either way
    assert cache.next_position == TOKENS
    assert torch.equal(cache.token_ids, ids)


def test_speckv_pays_for_its_draft(network: Network) -> None:
    ids, ahead = ids_of(network, TOKENS), 10
    reader = Reader(network, ids)
    prefill(build("speckv_draft", ahead=ahead), reader, limit(network, 30))
    costs = reader.costs
    assert costs.tokens_prefill == TOKENS + ahead
    assert costs.tokens_draft == TOKENS + ahead - 1  # the last one is not read by the draft
    assert costs.bytes_prefill == network.row_bytes() * (TOKENS + ahead - 1)  # its full cache


def model_in(folder: Path, network: Network, tokenizer: Any) -> str:
    network._model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["speckv_draft", "specpc"])
def test_a_draft_of_its_own(network: Network, name: str, tmp_path: Path) -> None:
    small = tiny_network(seed=5, hidden_size=32)
    method = build(name, draft=model_in(tmp_path / "draft", small, byte_tokenizer()))
    ids = ids_of(network, TOKENS)
    config = ModelConfig("tiny", "tiny", dtype="float32")
    model = Model(config, network, Writer(byte_tokenizer()), frozenset(), {})
    reader = Reader(network, ids, model=model)
    cache = prefill(method, reader, limit(network, 60))
    mine = prefill(build(name), Reader(network, ids), limit(network, 60))
    assert not torch.equal(cache.layers[1].dense().key, mine.layers[1].dense().key)
    assert reader.costs.tokens_draft == (TOKENS + 31 if name == "speckv_draft" else TOKENS)
    assert reader.costs.tokens_prefill == (TOKENS + 32 if name == "speckv_draft" else 60)

    other = byte_tokenizer()
    other.add_tokens(["<other>"])
    strange = build(name, draft=model_in(tmp_path / "strange", small, other))
    with pytest.raises(UsageError, match="another vocabulary than tiny"):
        strange.prefill(Reader(network, ids, model=model), limit(network, 60))


# -- SpecPC ------------------------------------------------------------------------------------------------------------


def specpc_tokens(network: Network, ids: Tensor, rows: int, window: int, pool: int, neighbours: int) -> list[int]:
    """What SpecPC keeps, token by token."""
    tokens = len(ids)
    weights = attentions(network, ids)
    scores = [0.0] * tokens
    for layer in weights[min(8, len(weights) // 2) :]:
        for turn, i in enumerate(range(tokens - window, tokens)):
            for j in range(tokens):
                scores[j] = max(scores[j], float(layer[:, i, j].max()) * turn / (window - 1))
    left, right = pool // 2, pool - pool // 2
    pooled = [max(scores[max(j - left, 0) : j + right]) for j in range(tokens)]
    found = list(range(tokens - window, tokens))
    for j in sorted(range(tokens), key=lambda j: (-pooled[j], j))[:rows]:
        near = [j] + [j + way * far for far in range(1, neighbours // 2 + 1) for way in (-1, 1)]
        found += [i for i in near if 0 <= i < tokens and i not in found]
    return sorted(found[:rows])


@pytest.mark.parametrize(("rows", "window", "pool", "neighbours"), [(40, 16, 8, 6), (70, 16, 5, 0), (50, 4, 32, 32)])
@pytest.mark.parametrize("layers", [LAYERS, 10])
def test_specpc_reads_a_shorter_prompt(rows: int, window: int, pool: int, neighbours: int, layers: int) -> None:
    network = tiny_network(num_hidden_layers=layers)
    ids, new = ids_of(network, TOKENS), ids_of(network, 9, seed=2)
    reader = Reader(network, ids)
    cache = prefill(build("specpc", window=window, pool=pool, neighbours=neighbours), reader, limit(network, rows))
    expected = specpc_tokens(network, ids, rows, window, pool, neighbours)
    assert len(expected) == rows == cache.next_position
    assert expected[-window:] == list(range(TOKENS - window, TOKENS))
    assert cache.token_ids.tolist() == ids[expected].tolist()
    # The model goes on as if the prompt had been these tokens, one next to the other.
    plainly = stock(network)(torch.cat([ids[expected], new])[None]).logits[:, rows:]
    torch.testing.assert_close(feed(network, [Fork(cache, Method())], new[None]), plainly, atol=1e-4, rtol=0)
    assert reader.costs.tokens_prefill == rows
    assert reader.costs.tokens_draft == TOKENS
    one_layer = network.row_bytes() // layers * TOKENS
    assert reader.costs.bytes_prefill == max(one_layer, network.row_bytes() * rows)


def test_specpc_chooses_rising_places_and_protects_the_end(network: Network) -> None:
    method: Any = build("specpc")
    for keep in (1, 7, 64, 65, 100, 150):
        scores = torch.rand(150, generator=torch.Generator().manual_seed(keep))
        chosen = method.choose(scores, keep)
        assert len(chosen) == keep
        assert (chosen.diff() > 0).all()
        last = min(64, keep // 2)
        assert chosen[keep - last :].tolist() == list(range(150 - last, 150))


# -- EpiCache ----------------------------------------------------------------------------------------------------------


class Lists:
    """One layer as lists of rows, one for each KV head; `on_trial` looks and keeps nothing but what was paid."""

    def __init__(self, kv_heads: int) -> None:
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(kv_heads)]
        self.trial: list[list[tuple[Tensor, Tensor]]] = []
        self.paid: list[list[float]] = []
        self.on_trial = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = torch.zeros_like(query)
        group = query.shape[1] // key.shape[1]
        if self.on_trial:
            self.paid = [[0.0] * len(rows) for rows in self.rows]
        for i in range(query.shape[2]):
            for g in range(key.shape[1]):
                fed = [(key[0, g, j], value[0, g, j]) for j in range(i + 1)]
                seen = self.rows[g] + fed
                keys, values = torch.stack([k for k, _ in seen]), torch.stack([v for _, v in seen])
                for h in range(g * group, (g + 1) * group):
                    logits = query[0, h, i] @ keys.T * scale
                    out[0, h, i] = logits.softmax(-1) @ values
                    if self.on_trial:
                        among = logits[: len(self.rows[g])].softmax(-1).tolist()
                        self.paid[g] = [max(a, b) for a, b in zip(self.paid[g], among, strict=True)]
        if not self.on_trial:
            for g in range(key.shape[1]):
                self.rows[g] += [(key[0, g, j], value[0, g, j]) for j in range(key.shape[2])]
        return out


def typical(network: Network, ids: Tensor, window: int, medoids: int) -> Tensor:
    passages = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    means = [network.embed(p).mean(0) for p in passages]
    means = [m / m.norm() for m in means]
    centre = sum(means) / len(means)
    near = [float(m @ centre) for m in means]
    return torch.cat([passages[i] for i in sorted(best(near, medoids))])


def run(network: Network, layers: Sequence[Lists], ids: Tensor, start: int, on_trial: bool) -> None:
    hidden = network.embed(ids)
    for i, layer in enumerate(layers):
        layer.on_trial = on_trial
        hidden = network.run_layer(i, hidden, start + torch.arange(len(ids)), layer)


@pytest.mark.parametrize("rows", [11, 40])
def test_epicache_ends_with_what_a_naive_reading_does(rows: int) -> None:
    network = tiny_network()
    tokens, block, text = 136, 17, 2 * 5
    ids = ids_of(network, tokens)
    counts = 4 * network.layers * network.kv_heads
    reader = Reader(network, ids)
    cache = prefill(build("epicache", medoids=5), reader, limit(network, rows, counts))

    passages = typical(network, ids, 2, 5)
    layers = [Lists(network.kv_heads) for _ in range(network.layers)]
    trials = 0
    for start in range(0, tokens, block):
        run(network, layers, ids[start : start + block], start, on_trial=False)
        if start + block <= rows:
            continue
        trials += 1
        run(network, layers, passages, start + block, on_trial=True)
        for layer in layers:
            every = [(layer.paid[g][j], g, j) for g in range(network.kv_heads) for j in range(len(layer.rows[g]))]
            stay = {(g, j) for _, g, j in sorted(every, reverse=True)[: rows * network.kv_heads]}
            layer.rows = [
                [row for j, row in enumerate(layer.rows[g]) if (g, j) in stay] for g in range(len(layer.rows))
            ]
    ragged = False
    for i, layer in enumerate(layers):
        ragged |= len({len(r) for r in layer.rows}) > 1
        for g, mine in enumerate(layer.rows):
            keys, values = held(cache, i, g)
            torch.testing.assert_close(keys, torch.stack([k for k, _ in mine]), atol=1e-4, rtol=0)
            torch.testing.assert_close(values, torch.stack([v for _, v in mine]), atol=1e-4, rtol=0)
    assert ragged
    assert cache.next_position == tokens
    assert cache.planned.payload == network.row_bytes() * rows
    assert len(passages) == text
    assert reader.costs.tokens_prefill == tokens + trials * text


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_epicache_never_holds_more_than_its_cap_a_block_and_the_passages(network: Network, share: float) -> None:
    tokens = 640
    budget = Allowance(int(share * network.row_bytes() * tokens))
    reader = Reader(network, ids_of(network, tokens))
    cache = prefill(build("epicache", block=32, medoids=3), reader, budget)
    most = budget.limit + network.row_bytes() * (32 + 3 * 10)
    assert most * 0.9 < reader.costs.bytes_prefill <= most < network.row_bytes() * tokens / 2
    assert budget.limit - 2 * network.row_bytes() < cache.nbytes <= budget.limit


def test_epicache_s_trial_changes_nothing(network: Network) -> None:
    ids = ids_of(network, TOKENS)
    reader = Reader(network, ids)
    method: Any = build("epicache")
    fork = Fork(reader.empty(), Method())
    feed(network, [fork], ids[None, :50])
    before = [(layer.tail[0].clone(), layer.tail[1].clone(), layer.length) for layer in fork.layers]
    scores = method.scratch(reader, fork, method.typical(reader))
    assert [s.shape for s in scores] == [(network.kv_heads, 50)] * LAYERS
    for (key, value, length), layer in zip(before, fork.layers, strict=True):
        assert torch.equal(layer.tail[0], key)
        assert torch.equal(layer.tail[1], value)
        assert layer.length == length
    assert fork.next_position == 50
    assert torch.equal(fork.token_ids, ids[:50])
    # What comes next is what would have come without it.
    again = Fork(reader.empty(), Method())
    feed(network, [again], ids[None, :50])
    assert torch.equal(feed(network, [fork], ids[None, 50:]), feed(network, [again], ids[None, 50:]))


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words(Task):
    """Two contexts, two questions each."""

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        for i in range(2):
            text = "".join("abcdefgh "[k * (k + i + 3) % 9] for k in range(90))
            examples = tuple(
                Example(f"{i}-{j}", f" And {j}?", ("a",), target="a b", max_new_tokens=4) for j in range(2)
            )
            yield Context(f"{i}", f"{i}", writer.encode(text), examples)

    def score(self, example: Example, answer: str) -> float:
        return len(answer) % 2


def cell(method: str, budget: str = "0.4", **options: Any) -> Cell:
    return Cell(ModelConfig("tiny", "tiny", dtype="float32"), build(method, **options), Budget.parse(budget), Words())


def records(one: Cell, results: Path) -> list[dict[str, Any]]:
    return read_cell(one.folder(results))[1]


@pytest.fixture
def _tiny_is_the_model(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_model", lambda config: tiny)


@pytest.mark.usefixtures("_tiny_is_the_model")
def test_cells_in_one_sweep_are_the_cells_alone(tmp_path: Path) -> None:
    company = [*map(cell, OWN), cell("specpc", "0.6"), cell("snapkv", window=8), cell("full")]
    loop.run_cells(company, Settings(tmp_path / "company"))
    for one in company:
        loop.run_cells([one], Settings(tmp_path / "alone"))
        assert len(records(one, tmp_path / "alone")) == 4
        assert records(one, tmp_path / "company") == records(one, tmp_path / "alone")


@pytest.mark.usefixtures("_tiny_is_the_model")
def test_records_say_what_reading_cost(tiny: Model, tmp_path: Path) -> None:
    company = [*map(cell, OWN), cell("snapkv", window=8), cell("kvzip"), cell("full")]
    loop.run_cells(company, Settings(tmp_path, timed=1))
    row = tiny.network.row_bytes()
    for one in company:
        for record in records(one, tmp_path):
            name, tokens = plugins.name_of(one.method), record["tokens_context"]
            rows = math.floor(0.4 * tokens)
            assert record["bytes_full"] == row * tokens > 90 * row  # of the context as given, whatever was read
            assert name == "full" or record["bytes_held"] <= record["bytes_budget"] == int(0.4 * row * tokens)
            draft = {"specpc": tokens, "speckv_draft": tokens + 31}
            assert record["tokens_draft"] == draft.get(name, 0)
            lead = {"fastkv": (tokens + rows) / 2, "speckv_draft": tokens + 32, "specpc": rows, "kvzip": 2 * tokens}
            if name != "epicache":
                assert record["tokens_prefill"] == lead.get(name, tokens)
            if name in ("snapkv", "kvzip", "full"):
                assert record["bytes_prefill"] == row * tokens
            if name in ("epicache", "fastkv", "specpc"):
                assert record["bytes_held"] <= record["bytes_prefill"] < row * tokens
        [timed] = [r for r in records(one, tmp_path) if "tpot_s" in r]
        assert timed["prefill_s"] > 0
        assert timed["ttft_s"] > timed["prefill_s"]
        assert (timed["compress_s"] == 0) == one.method.own_prefill


def test_a_budget_in_tokens_is_of_the_context_as_given(tiny: Model) -> None:
    compressor = Compressor(cell("specpc", "0.9r"), tiny)
    reader = compressor.reader(ids_of(tiny.network, 200), "c")
    cache = compressor.compress(reader)
    record = compressor.describe(reader, cache)
    assert cache.next_position == record["tokens_kept"] == 20
    assert record["tokens_context"] == 200
    assert record["bytes_budget"] == 20 * tiny.network.row_bytes()


@dataclass(frozen=True)
class Ones(Calibration):
    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"ones": torch.ones(3)}, {}


@dataclass(frozen=True)
class Fitted(Method):
    """A toy that reads as far as it was fitted to."""

    own_prefill: ClassVar[bool] = True

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return frozenset({Ones()})

    def prefill(self, reader: Reader, budget: Allowance) -> CompressedCache:
        number = len(reader.artefacts[Ones()].tensors["ones"])
        seen = reader.read(reader.token_ids[:number])
        return CompressedCache.pack(keep_all(seen), seen)


@pytest.mark.usefixtures("own_cache")
def test_what_was_fitted_reaches_an_own_prefill(tiny: Model) -> None:
    compressor = Compressor(Cell(tiny.config, Fitted(), Budget.parse("0.5"), Words()), tiny)
    cache = compressor.compress(compressor.reader(ids_of(tiny.network, 40), "c"))
    assert cache.next_position == 3
