"""kvpress's side of sweep_vs_kvpress.py, run by kvpress's own environment: one press and one ratio after the other.

    python benchmarks/kvpress_worker.py job.json rows.jsonl

The job names the model's folder, the layers' dtype, new_tokens, the contexts as token ids and the cells as (method,
share of the cache that is kept). The first row has versions and loading time, then there is one for each call.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import (
    KeyDiffPress,
    KnormPress,
    KVPressTextGenerationPipeline,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PRESSES = {
    "random": RandomPress,
    "streamingllm": StreamingLLMPress,
    "snapkv": SnapKVPress,
    "knorm": KnormPress,
    "keydiff": KeyDiffPress,
}


class Pipeline(KVPressTextGenerationPipeline):
    """kvpress's pipeline, but it is given token ids: both sides read the same ones, and tokenising takes no time."""

    def preprocess(self, context: torch.Tensor, questions: list[torch.Tensor], **_):
        return {"context_ids": context, "questions_ids": questions}


def main(job_file: str, rows_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    logging.disable_progress_bar()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    pipeline = Pipeline(model=model, tokenizer=tokenizer, device="cpu")
    about = {"load_s": time.perf_counter() - start, "dtype": str(model.dtype), "threads": torch.get_num_threads()}
    about["attention"] = model.config._attn_implementation
    about["versions"] = {name: version(name) for name in ("kvpress", "transformers", "torch")}

    tokens = 0

    def count(*_) -> None:  # the head is asked once for each token of an answer
        nonlocal tokens
        tokens += 1

    model.lm_head.register_forward_hook(count)
    with open(rows_file, "w") as rows:
        print(json.dumps(about), file=rows)
        for i, context in enumerate(job["contexts"]):
            read, asked = (torch.tensor([context[part]]) for part in ("read", "asked"))
            if i == 0:  # allocations and first calls are not timed
                pipeline(read, questions=[asked], max_new_tokens=2)
            for method, kept in job["cells"]:
                press = None if method == "full" else PRESSES[method](compression_ratio=1 - kept)
                tokens, start, cpu = 0, time.perf_counter(), time.process_time()
                answers = pipeline(read, questions=[asked], press=press, max_new_tokens=job["new_tokens"])["answers"]
                took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
                row = {"context": context["id"], "method": method, "budget": kept, **took}
                row |= {"answer": answers[0], "tokens_out": tokens}
                print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
