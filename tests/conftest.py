"""Tiny random models, and what the real one needs."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvbench import fetch
from kvbench.cache.hf import Network
from kvbench.cell import ModelConfig
from kvbench.errors import UsageError
from kvbench.model import Model
from kvbench.prompt import Writer

TEMPLATE = "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"


def tiny_network(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: int) -> Network:
    """A random model of 2 layers, 4 heads, 2 KV heads of 16, vocabulary 260; weights large enough to attend sharply."""
    sizes = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "initializer_range": 0.3,
        "sliding_window": None,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | changes)), dtype=dtype)
    return Network(model)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>", "<u>", "<a>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def load_script(name: str) -> ModuleType:
    """scripts/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A complete tiny model: network, tokenizer, facts."""
    config = ModelConfig(name="tiny", path="tiny", dtype="float32")
    tokenizer = byte_tokenizer()
    stop = frozenset({tokenizer.eos_token_id})
    return Model(
        config, tiny_network(), Writer(tokenizer), stop, {"weights": "random-0", "device": "cpu", "torch_threads": 1}
    )


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, with the fetched parts of the user's: artefacts of toys stay out of that."""
    real, folder = fetch.cache_folder(), tmp_path_factory.mktemp("cache")
    for part in ("models", "corpora", "artefacts/smollm2-135m-q4_1"):
        if (real / part).exists():
            (folder / part).parent.mkdir(exist_ok=True)
            (folder / part).symlink_to(real / part)
    before = os.environ.get("KVBENCH_CACHE")
    os.environ["KVBENCH_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["KVBENCH_CACHE"]
    else:
        os.environ["KVBENCH_CACHE"] = before


@pytest.fixture(scope="session")
def corpora() -> None:
    """Skips where the corpora have not been fetched."""
    try:
        fetch.corpus("essays")
    except UsageError as error:
        pytest.skip(str(error))


def ids_of(network: Network, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(seed))
