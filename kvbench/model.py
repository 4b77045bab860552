"""Loading a model: the network, its tokenizer, and the facts a header needs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvbench import fetch
from kvbench.cache.hf import Network, check_supported
from kvbench.cell import ModelConfig
from kvbench.decode import rows_together
from kvbench.errors import UsageError
from kvbench.prompt import Writer


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    network: Network
    writer: Writer
    stop: frozenset[int]  # end-of-turn token ids
    facts: dict[str, Any]

    @cached_property
    def rows(self) -> int:
        """How many answers advance in one batch; 1 where company would change them."""
        return rows_together(self.network, self.config.together)

    @property
    def identity(self) -> dict[str, Any]:
        """What an artefact is fitted for: the weights, not the device or the chat template."""
        return {"name": self.config.name, "weights": self.facts["weights"], "dtype": self.config.dtype}


def load_model(config: ModelConfig) -> Model:
    """Raises UsageError when weights are missing or the architecture is not supported."""
    model, tokenizer, facts = pretrained(config)
    network = Network(model, getattr(torch, config.dtype))
    # Tasks that cut long prompts ask the tokenizer, which may claim more than the model reads.
    tokenizer.model_max_length = min(tokenizer.model_max_length, network.max_positions)
    writer = Writer(tokenizer, config.chat, config.template)
    return Model(config, network, writer, end_ids(model) | {tokenizer.eos_token_id}, facts)


def pretrained(config: ModelConfig) -> tuple[Any, Any, dict[str, Any]]:
    """(transformers' model on its device or devices, its tokenizer, the facts a header needs). Raises UsageError."""
    path, source = config.path, "hub"
    if path.startswith("embedded:"):
        path, source = str(fetch.embedded_model()), "embedded"
    elif Path(path).expanduser().is_dir():
        path, source = str(Path(path).expanduser()), "folder"
    spread, random = config.device == "spread", config.weights == "random"
    if spread and random:
        raise UsageError("model.device=spread is for trained weights: random ones are drawn on one device")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = found if config.device in ("auto", "spread") else config.device
    dtype = getattr(torch, config.dtype)
    compute = _compute_dtype(dtype, device) if config.compute == "auto" else getattr(torch, config.compute)
    logging.disable_progress_bar()  # a second's worth of bars on every run
    try:
        about = AutoConfig.from_pretrained(path, revision=config.revision)
        check_supported(about)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision)
        if random:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(about, dtype=compute)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                revision=config.revision,
                dtype=compute,
                use_safetensors=True,
                device_map="auto" if spread else None,
            )
    except OSError as error:
        hint = f"fetch it with `hf download {path}` or set model.path to a local folder"
        raise UsageError(f"the weights of {config.name} are not to be had: {hint}") from error
    model = model if spread else model.to(torch.device(device))
    used = dict.fromkeys(p.device for p in model.parameters())
    facts = {
        "source": source,
        "weights": "random" if random else _weights_name(source, Path(path), about),
        "compute": str(compute).removeprefix("torch."),
        "prefill_chunk": config.prefill_chunk,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": ", ".join(torch.cuda.get_device_name(x) if x.type == "cuda" else x.type for x in used),
        "torch_threads": torch.get_num_threads(),
    }
    return model, tokenizer, facts


def end_ids(model: Any) -> frozenset[int]:
    """The tokens that end an answer, as the model's generation settings have them."""
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def _compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """`dtype`, or float32 where the CPU would emulate it, three times slower."""
    native = {"amx_bf16", "avx512_bf16"}
    capable = device != "cpu" or any(on and name in native for name, on in torch.cpu.get_capabilities().items())
    return dtype if capable else torch.float32


def _weights_name(source: str, path: Path, config: Any) -> str:
    """The hub's commit, or a hash of the local weight files."""
    if source == "hub":
        return str(config._commit_hash)
    if source == "embedded":
        return json.loads((path / "done.json").read_text())["files"]["model.safetensors"][:16]
    hashes = "".join(fetch.file_hash(file) for file in sorted(path.glob("*.safetensors")))
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]
