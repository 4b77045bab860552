"""kvbench from Python: compression around `generate`, and the command line's sweeps as tables."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_network
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from sweeps import SWEEP, prepared, timeless
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import kvbench
from kvbench import fetch, generation, loop
from kvbench.artefact import location
from kvbench.budget import Budget
from kvbench.cache.fork import Fork
from kvbench.cache.hf import FAMILIES, Network
from kvbench.cache.packed import CompressedCache
from kvbench.cell import ModelConfig
from kvbench.decode import feed, greedy
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import load_model
from kvbench.plugins import build_method
from kvbench.prefill import Reader, read_exactly
from kvbench.run import main
from kvbench.store import cells, read_cell
from kvbench.sweep import words
from kvbench.toolbox.value_maps import ValueMaps

TOKENS, NEW = 90, 24
ROOT = Path(__file__).parent.parent


def stock(family: str = "llama", **changes: int) -> Any:
    """A random model as a user has it: nothing of ours about it."""
    model: Any = tiny_network(family, **changes)._model
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return stock()


def prompt(seed: int = 1, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(seed))


def said(model: Any, ids: Tensor, **options: Any) -> list[int]:
    """The new tokens of `generate`."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, **options)[0, ids.shape[1] :].tolist()


# -- compress: the same as ... -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_says_what_stock_generate_says(family: str) -> None:
    model, ids = stock(family), prompt()
    want = said(model, ids)
    assert len(set(want)) > NEW // 2
    with kvbench.compress(model, "full"):
        assert said(model, ids) == want
    with kvbench.compress(model, "snapkv", budget=1):
        assert said(model, ids) == want
    with kvbench.compress(model, "snapkv", budget=0.25):
        assert said(model, ids) != want
    assert said(model, ids) == want


@torch.inference_mode()
def own_answer(model: Any, ids: Tensor, method: Method, budget: str, fed: int = 1) -> tuple[list[int], CompressedCache]:
    """What kvbench's own parts make of the same prompt."""
    network = Network(copy.deepcopy(model))
    context, rest = ids[0, :-fed], ids[:, -fed:]
    allowance = Budget.parse(budget).allow(network.row_bytes() * len(context), len(context))
    if method.own_prefill:
        cache = method.prefill(Reader(network, context, method.needs), allowance)
    else:
        seen = read_exactly(network, context, method.needs)
        cache = CompressedCache.pack(method.plan(seen, allowance), seen)
    fork = Fork(cache, method)
    first = feed(network, [fork], rest, last_only=True)[:, -1]
    return greedy(network, [fork], first, lambda answer: False, NEW)[0], cache


@pytest.mark.parametrize("fed", [1, 20])
@pytest.mark.parametrize(
    ("name", "options"),
    [("snapkv", {"window": 8}), ("h2o", {"decode": True}), ("kivi", {}), ("quest", {"page": 4}), ("fastkv", {})],
    ids=str,
)
def test_a_method_says_what_the_own_loop_says(model: Any, name: str, options: dict[str, Any], fed: int) -> None:
    ids, budget = prompt(2), "0.5"
    want, cache = own_answer(model, ids, build_method(name, **options), budget, fed)
    with kvbench.compress(model, name, float(budget), fed=fed, **options) as held:
        assert said(model, ids) == want
    assert held.bytes_held == cache.nbytes
    assert held.tokens_context == TOKENS - fed


def test_a_preset_and_a_method_of_ones_own(model: Any) -> None:
    ids = prompt(3)
    made = build_method("compose", tiers=["int4"])
    for method in (made, "snapkv_4bit"):
        with kvbench.compress(model, method, "0.25") as held:
            assert said(model, ids) == own_answer(model, ids, made, "0.25")[0]
        assert list(held.tiers) == ["int4"]


def test_two_calls_start_afresh(model: Any) -> None:
    first, second = prompt(4), prompt(5, TOKENS // 2)
    alone = []
    for ids in (first, second):
        with kvbench.compress(model, "snapkv", 0.5):
            alone.append(said(model, ids))
    with kvbench.compress(model, "snapkv", 0.5) as held:
        assert [said(model, ids) for ids in (first, second, first)] == [*alone, alone[0]]
        assert held.tokens_context == TOKENS - 1
        said(model, second)
        assert held.tokens_context == TOKENS // 2 - 1


def test_samples_come_from_torchs_own_seed(model: Any) -> None:
    ids = prompt()

    def sampled(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return said(model, ids, do_sample=True, temperature=2.0, top_k=0)

    want = sampled(0)
    with kvbench.compress(model, "full"):
        assert sampled(0) == want
        assert sampled(1) != want
    with kvbench.compress(model, "random", 0.5):
        assert sampled(0) == sampled(0)


def test_an_answer_ends_where_it_ends(model: Any) -> None:
    ids = prompt()
    end = said(model, ids)[5]
    with kvbench.compress(model, "full"):
        assert said(model, ids, eos_token_id=end, pad_token_id=0)[-1] == end
        out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    assert [len(x) for x in (out.sequences[0], out.logits)] == [TOKENS + 3, 3]


# -- what it says and reads --------------------------------------------------------------------------------------------


def test_bytes_are_those_of_a_record(model: Any) -> None:
    with kvbench.compress(model, "snapkv", budget=0.25, window=8) as held:
        assert held.describe() == {}
        assert repr(held) == "nothing held yet"
        with pytest.raises(AttributeError, match="bytes_held"):
            held.bytes_held  # noqa: B018
        said(model, prompt())
    row = 2 * 2 * 2 * 16 * 4
    assert held.bytes_full == row * (TOKENS - 1)
    rows = (TOKENS - 1) // 4
    assert (held.bytes_held, held.tokens_kept) == (row * rows, rows)
    assert held.bytes_budget == int(held.bytes_full / 4)
    assert held.bytes_tail == row * NEW  # the last token of the prompt, and all that was said but for its last token
    assert held.bytes_decode_peak == held.bytes_held + held.bytes_tail
    assert repr(held) == "11,264 of 45,568 bytes held (24.7%): 22.0 of 89 tokens per KV head"


def test_the_prompt_is_read_once(model: Any) -> None:
    fed: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, given, out: fed.append(out.shape[1]))
    with kvbench.compress(model, "snapkv", 0.25) as held:
        said(model, prompt())
    hook.remove()
    assert fed == [TOKENS - 1, 1] + [1] * (NEW - 1)
    assert held.tokens_prefill == TOKENS - 1


def test_the_cache_has_a_dtype_of_its_own(model: Any) -> None:
    with kvbench.compress(model, "full") as exact:
        said(model, prompt())
    with kvbench.compress(model, "full", dtype="bfloat16") as half:
        said(model, prompt())
    assert exact.bytes_held == 2 * half.bytes_held


# -- the model afterwards ----------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    def state() -> tuple[Any, ...]:
        training = [module.training for module in model.modules()]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        return model.config.to_dict(), model.config._attn_implementation, dict(vars(model)), training, hooks

    before, logits = state(), model(prompt()).logits
    yield
    assert state() == before
    assert torch.equal(model(prompt()).logits, logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_as_it_was(attention: str) -> None:
    model = stock()
    model.set_attn_implementation(attention)
    model.train()
    model.model.layers[0].eval()  # a part of it frozen
    with unchanged(model), kvbench.compress(model, "snapkv", 0.25):
        said(model, prompt())
    with unchanged(model), pytest.raises(ZeroDivisionError), kvbench.compress(model, "snapkv", 0.25):
        raise ZeroDivisionError
    with unchanged(model), pytest.raises(UsageError), kvbench.compress(model, "snapkv", 1e-6):
        said(model, prompt())


def test_a_forward_of_ones_own_comes_back() -> None:
    model = stock()
    model.forward = model.forward  # as accelerate's hooks do
    with unchanged(model), kvbench.compress(model, "full"):
        with kvbench.compress(model, "random", 0.25) as inner:
            said(model, prompt())
        said(model, prompt())
    assert inner.tokens_kept < TOKENS / 3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "batches, beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "several answers"),
        ({"inputs": prompt().repeat(2, 1)}, "batches"),
        ({"attention_mask": (torch.arange(TOKENS) > 2).long()[None]}, "padding"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"prefill_chunk_size": 40}, "a prompt in chunks"),
        ({"cache_implementation": "static"}, "a cache of your own"),
        ({"cache_implementation": "offloaded"}, "a cache of your own"),
        ({"position_ids": torch.arange(5, TOKENS + 5)[None]}, "positions of your own"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"inputs": prompt(tokens=1)}, "a prompt of 1 tokens leaves nothing to compress"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_generate_can_do_besides_is_refused(model: Any, options: dict[str, Any], reason: str) -> None:
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = 3
    model.set_attn_implementation("eager")  # the only one that would give attentions
    with kvbench.compress(model, "snapkv", 0.5), pytest.raises(UsageError, match=reason) as told:
        model.generate(**{"inputs": prompt(), "max_new_tokens": 4, "do_sample": False} | options)
    assert "\n" not in str(told.value)


def test_embeddings_and_calls_of_the_model_are_refused(model: Any) -> None:
    ids = prompt()
    with kvbench.compress(model, "snapkv", 0.5):
        with pytest.raises(UsageError, match="inputs_embeds"):
            model.generate(inputs_embeds=model.model.embed_tokens(ids), max_new_tokens=4, eos_token_id=None)
        with pytest.raises(UsageError, match="calls of the model itself"):
            model(ids, past_key_values=DynamicCache())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"method": "nope"}, "unknown method 'nope'; known: adakv"),
        ({"method": "snapkv", "windw": 1}, "unknown option 'method.windw'; known: method.window, method.pool"),
        ({"method": "snapkv", "window": "wide"}, "method.window: Value 'wide'"),
        ({"method": "vector", "base": "kivi"}, "scores no tokens"),
        ({"method": Method(), "window": 1}, "window: options go with a method's name"),
        ({"budget": 0}, "budget=0 is not above zero"),
        ({"fed": 0}, "fed=0: at least"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_is_wrong_is_told_in_one_line(model: Any, given: dict[str, Any], reason: str) -> None:
    with unchanged(model), pytest.raises(UsageError, match=reason) as told, kvbench.compress(model, **given):
        pass
    assert "\n" not in str(told.value)


def test_other_models_are_refused() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    refused = {"the family 'gpt2'": other, "Linear is no causal language model": torch.nn.Linear(2, 2)}
    offloaded = stock()
    offloaded.model.layers[1].to("meta")
    refused |= {"LlamaModel is no causal": stock().model, "offloaded to the host or the disk": offloaded}
    for reason, model in refused.items():
        with pytest.raises(UsageError, match=reason), kvbench.compress(model, "full"):
            pass
    assert "forward" not in vars(other)
    assert other.training
    assert other.config._attn_implementation == "sdpa"


# -- what is fitted once per model -------------------------------------------------------------------------------------


def test_a_fit_belongs_to_the_weights(tmp_path: Path, own_cache: Path) -> None:
    """The maps that a run has fitted serve a loaded model, until its weights are changed."""
    stock().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    maps = ValueMaps(("pydoc",))
    run = load_model(ModelConfig(str(tmp_path), str(tmp_path), dtype="float32", device="cpu"))

    def place(model: Any) -> Path:
        network = Network(copy.deepcopy(model), torch.float32)
        return location(maps, generation._model(model, network, build_method("vector"), None))

    loaded, tokenizer = kvbench.load(str(tmp_path), dtype="float32", device="cpu")
    assert tokenizer("ab")["input_ids"]
    assert loaded.config._attn_implementation == "sdpa"
    assert place(loaded) == location(maps, run)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    mine = place(other)
    assert place(other) == mine != place(loaded)
    loaded.model.layers[1].mlp.up_proj.weight.data += 1
    other.model.layers[1].mlp.up_proj.weight.data += 1
    assert place(loaded) == place(other) != mine


def test_a_tokenizer_is_asked_for_where_one_is_needed(model: Any, own_cache: Path) -> None:
    fit = {"texts": ["pydoc"], "calibration_tokens": 2048}
    with pytest.raises(UsageError, match="tokenizer="), kvbench.compress(model, "vector", 0.5, **fit):
        pass
    with kvbench.compress(model, "vector", 0.5, tokenizer=byte_tokenizer(), **fit) as held:
        said(model, prompt())
    assert held.bytes_shared > 0
    with kvbench.compress(model, "vector", 0.5, **fit):  # it has been fitted
        pass


def test_a_loaded_model_has_the_caches_dtype(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = kvbench.load(str(tmp_path), device="cpu", compute="float32").model
    assert loaded.dtype == torch.float32
    with kvbench.compress(loaded, "full") as held:
        said(loaded, prompt())
    assert held.bytes_full == 2 * 2 * 2 * 16 * 2 * (TOKENS - 1)
    with pytest.raises(UsageError, match="unknown option 'dtyp'"):
        kvbench.load(str(tmp_path), dtyp="float32")


# -- evaluate and read -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def chosen(folder: Path) -> Iterator[dict[str, Any]]:
    """The tiny model and the toy of a task, as options."""
    with prepared(folder) as given:
        options: dict[str, Any] = dict(word.split("=", 1) for word in given)
        yield options | {"timed": 0}


def test_evaluate_is_the_command_line(folder: Path, chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said_so = [f"{name}={value}" for name, value in chosen.items()]
    assert main([*SWEEP, *said_so, f"results={folder / 'line'}"]) == 0
    sweep = {"method": ["random", "streamingllm"], "budget": 0.3, "seed": [0, 1]}
    table = kvbench.evaluate(**sweep, **chosen, results=folder / "python")
    assert timeless(folder / "python") == timeless(folder / "line")

    every = [(read_cell(place), place) for place in cells(folder / "python")]
    assert len(table) == sum(len(records) for (_, records), _ in every) == 4 * 8
    first = ["method", "budget", "task", "model", "protocol", "seed", "cell"]
    assert list(table.columns[:7]) == first
    assert set(table.columns[7:]) == set(every[0][0][1][0])
    assert set(map(tuple, table[first[:6]].to_numpy())) == {
        (method, "0.3", "letters", "tiny", "blind", seed) for method in sweep["method"] for seed in (0, 1)
    }
    for (header, records), _ in every:
        mine = table[table["cell"] == header["digest"]]
        assert [row["id"] for row in records] == mine["id"].to_list()
        assert [row["kl_full"] for row in records] == mine["kl_full"].to_list()

    again = kvbench.read(folder / "python").sort_values(["cell", "id"]).reset_index(drop=True)
    assert again.equals(table.sort_values(["cell", "id"]).reset_index(drop=True))

    monkeypatch.setattr(loop, "load_model", lambda config: pytest.fail("nothing is left to do"))
    few = kvbench.evaluate(**sweep, **chosen, results=folder / "python", limit=3)
    assert few.groupby("cell").size().to_list() == [3] * 4


def test_options_with_lists_in_them(folder: Path, chosen: dict[str, Any]) -> None:
    given = {"method": "compose", "method.tiers": ("exact", "int4"), "task.number": [1, 2], "budget": 0.5}
    table = kvbench.evaluate(**given, **chosen, results=f"{folder}/a folder, of 'mine'")
    assert table["method"].unique().tolist() == ["compose"]
    assert table["task"].to_list() == ["letters(number=1)"] * 2 + ["letters(number=2)"] * 4
    assert set(table["tiers"].map(tuple)) == {("exact", "int4")}


def test_a_cell_that_cannot_be_run(folder: Path, chosen: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="below the smallest plan of snapkv"):
        kvbench.evaluate(method="snapkv", budget=1e-5, **chosen, results=folder / "refused")
    assert not (folder / "refused").exists()
    assert "smallest" not in capfd.readouterr().err
    table = kvbench.evaluate(method="snapkv", budget=[1e-5, 0.5], limit=2, **chosen, results=folder / "refused")
    assert table["budget"].to_list() == ["0.5"] * 2
    told = capfd.readouterr().err
    assert "below the smallest plan of snapkv" in told
    assert "1 of 2 cells are infeasible" in told
    with pytest.raises(UsageError, match="2 of 2 cells are infeasible"):
        kvbench.evaluate(method="snapkv", budget=[1e-5, 2e-5], limit=2, **chosen, results=folder / "refused")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"method": "nope"}, "unknown method 'nope'"),
        ({"method": ["full", "nope"]}, "unknown method 'nope'"),
        ({"methd": "full"}, "unknown option 'methd'"),
        ({"method.windw": 1}, "unknown option 'method.windw'"),
        ({"method.windw": [1, 2]}, "unknown option 'method.windw'"),
        ({"budget": [0.1, 0]}, "budget=0 is not above zero"),
        ({"budget": []}, "budget=\\[\\] leaves nothing to run"),
        ({"limit": 0}, "limit=0 leaves no example"),
        ({"limit": [0]}, "limit=0 leaves no example"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_sweep_is_told_in_one_line(
    folder: Path, chosen: dict[str, Any], given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason) as told:
        kvbench.evaluate(**{"method": "snapkv"} | chosen | given, results=folder / "nothing")
    assert "\n" not in str(told.value)
    assert not (folder / "nothing").exists()


def test_no_records_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no records in"):
        kvbench.read(tmp_path)


@given(st.text(alphabet=" ab\\\"'$,{}=[]:()~*!é#\n"))
def test_texts_reach_the_configuration_as_they_are(text: str) -> None:
    [override] = OverridesParser.create().parse_overrides(words({"results": text}))
    value: Any = override.value()
    assert getattr(value, "text", value) == text


def test_the_readme_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        fetch.embedded_model()
    except UsageError as error:
        pytest.skip(str(error))
    [code] = re.findall(r"```python\n(import kvbench\n.*?)\n\ntable = ", (ROOT / "README.md").read_text(), re.S)
    exec(code, {})
    [shown] = re.findall(r"print\(held\)  # (.*)", code)
    assert capsys.readouterr().out == shown + "\n"


# -- what importing costs ----------------------------------------------------------------------------------------------


def test_importing_and_reading_need_no_torch(folder: Path, chosen: dict[str, Any]) -> None:
    kvbench.evaluate(method="full", limit=1, **chosen, results=folder / "light")
    code = f"""
import sys
import kvbench
assert not {{"torch", "transformers", "pandas", "hydra", "numpy"}} & set(sys.modules), "importing"
assert len(kvbench.read({str(folder / "light")!r})) == 1
assert not {{"torch", "transformers", "hydra"}} & set(sys.modules), "reading"
kvbench.evaluate
assert not {{"torch", "transformers"}} & set(sys.modules), "evaluate"
assert not hasattr(kvbench, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
