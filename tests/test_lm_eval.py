"""lm-eval's tasks in our loop, our methods in lm-eval's: with the full cache the answers are those of its own model."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_network

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvbench[lm-eval]'")

from kvbench import loop, plugins
from kvbench.budget import Budget
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.errors import UsageError
from kvbench.model import Model, load_model
from kvbench.store import read_cell

LMEval = plugins.load("tasks", "lm_eval")
NUMBER = 6
COMMON = {"dataset_path": "json", "test_split": "test", "fewshot_split": "train", "metadata": {"version": 1.0}}
FREE = COMMON | {
    "task": "tiny_free",
    "output_type": "generate_until",
    "doc_to_text": "{{passage}}\nQuestion: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE = COMMON | {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{passage}}\nQuestion: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
LIKELY = COMMON | {
    "task": "tiny_likely",
    "output_type": "loglikelihood",
    "doc_to_text": "{{passage}} ",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
OTHERS = [
    FREE | {"task": "tiny_prefix", "gen_prefix": "It is", "num_fewshot": 0},
    FREE
    | {
        "task": "tiny_filters",
        "doc_to_target": "{{gold}}",
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
            for name, pattern in (("strict", "is ([0-9]+)"), ("flexible", "([0-9]+)"))
        ],
    },
    FREE | {"task": "tiny_sampled", "generation_kwargs": {"until": ["e"], "do_sample": True, "temperature": 1.0}},
    {key: value for key, value in FREE.items() if key not in ("generation_kwargs", "metric_list")}
    | {"task": "tiny_rolling", "output_type": "loglikelihood_rolling", "doc_to_target": "{{passage}}"},
    CHOICE | {"task": "tiny_inputs", "doc_to_text": "{{gold}}", "doc_to_target": "{{answer}}"},
    CHOICE | {"task": "tiny_empty", "doc_to_text": ""},
    {"group": "tiny_group", "task": ["tiny_free", "tiny_choice"]},
]


def document(i: int) -> dict[str, Any]:
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "another", "that", "there")
    passage = " ".join(words[(i * k) % len(words)] for k in range(1, 30))
    choices = ["a mat", "the other cat", "nothing"]
    return {"passage": passage, "question": f"what is {i}?", "answer": f"it {i}", "choices": choices, "gold": i % 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with its tokenizer, and task files."""
    made = tmp_path_factory.mktemp("lm_eval")
    model, tokenizer = tiny_network()._model, byte_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    tasks = made / "tasks"
    tasks.mkdir()
    for split, numbers in (("test", range(NUMBER)), ("train", range(100, 104))):
        (made / f"{split}.jsonl").write_text("".join(json.dumps(document(i)) + "\n" for i in numbers))
    files = {"data_files": {split: str(made / f"{split}.jsonl") for split in ("test", "train")}}
    for task in (FREE, CHOICE, LIKELY, *OTHERS):
        name = task.get("task") if isinstance(task["task"], str) else task["group"]
        own = task if "group" in task else task | {"dataset_kwargs": files}
        (tasks / f"{name}.yaml").write_text(json.dumps(own))  # which is YAML
    return made


@pytest.fixture(scope="module", autouse=True)
def own_data_cache(tmp_path_factory):
    """What `datasets` makes of the files stays out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def config(folder) -> ModelConfig:
    return ModelConfig(name="tiny", path=str(folder / "model"), dtype="float32", chat=False)


@pytest.fixture(scope="module")
def model(config) -> Model:
    return load_model(config)


def stock(folder: Path, model: Any, names: list[str], **options: Any) -> dict[str, Any]:
    """lm-eval's own loop around a model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    return simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


@pytest.fixture(scope="module")
def own_model(folder) -> Any:
    """The model that lm-eval itself would run."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return HFLM(pretrained=network, tokenizer=AutoTokenizer.from_pretrained(folder / "model"), device="cpu")


def kvbench_model(folder: Path, **options: Any) -> Any:
    from kvbench.lm_eval_model import KVBench

    tiny = {"model.path": str(folder / "model"), "model.name": "tiny", "model.dtype": "float32"}
    return KVBench(**(tiny | options))


def task(folder: Path, name: str, **options: Any) -> Any:
    return LMEval(name=name, include=str(folder / "tasks"), **options)


def records(made: Any, config: ModelConfig, results: Path, method: str = "full", budget: str = "1") -> Any:
    """Runs a task in our loop; its records in order."""
    cell = Cell(config, plugins.build_method(method), Budget.parse(budget), made)
    loop.run_cells([cell], Settings(results))
    return read_cell(cell.folder(results))[1]


def samples(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def some(model: Model, made: Any, number: int = 3, seed: int = 0) -> list[Any]:
    return list(islice(made.contexts(model.writer, seed), number))


def text(model: Model, context: Any, protocol: str = "blind") -> tuple[str, str]:
    (example,) = context.examples
    prompt = model.writer.prompt(context.ids, example.question, example.answer_prefix, context.chat)
    return tuple(model.writer.tokenizer.decode(part) for part in prompt.split(protocol))


# -- the same as lm-eval's own model, with the full cache --------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(folder, own_model) -> dict[str, Any]:
    return stock(folder, own_model, ["tiny_free", "tiny_choice", "tiny_likely"], num_fewshot=1)


def test_our_model_answers_as_lm_evals_own(folder, reference):
    found = stock(folder, kvbench_model(folder), ["tiny_free", "tiny_choice", "tiny_likely"], num_fewshot=1)
    for name in reference["results"]:
        for mine, theirs in zip(samples(found, name), samples(reference, name), strict=True):
            assert mine["arguments"] == theirs["arguments"]
            if name == "tiny_free":
                assert mine["resps"] == theirs["resps"]
            else:
                values, likeliest = zip(*mine["filtered_resps"], strict=True)
                expected, is_likeliest = zip(*theirs["filtered_resps"], strict=True)
                assert values == pytest.approx(expected, abs=1e-3)
                assert likeliest == is_likeliest
        scores = {key: value for key, value in reference["results"][name].items() if isinstance(value, float)}
        assert {key: found["results"][name][key] for key in scores} == pytest.approx(scores, rel=1e-4)
    about = found["config"]["kvbench"]
    assert about["bytes_held"] == about["bytes_full"] > 0
    assert about["contexts"] == 3 * NUMBER


def test_our_loop_answers_as_lm_evals_own(folder, config, reference, tmp_path):
    free = records(task(folder, "tiny_free", shots=1), config, tmp_path)
    for record, sample in zip(free, samples(reference, "tiny_free"), strict=True):
        cut = record["answer"].partition("e")[0].partition("\n\n")[0]
        assert cut == sample["filtered_resps"][0]
        assert record["score"] == sample["exact_match"]
    choice = records(task(folder, "tiny_choice", shots=1), config, tmp_path)
    for record, sample in zip(choice, samples(reference, "tiny_choice"), strict=True):
        assert record["choice_logprobs"] == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=1e-3)
        assert record["score"] == sample["acc"]
        assert record["info"]["metric"] == "acc,none"
    assert 0 < sum(record["score"] for record in choice) < NUMBER
    norm = records(task(folder, "tiny_choice", shots=1, metric="acc_norm"), config, tmp_path)
    assert [record["score"] for record in norm] == [s["acc_norm"] for s in samples(reference, "tiny_choice")]
    likely = records(task(folder, "tiny_likely", shots=1), config, tmp_path)
    for record, sample in zip(likely, samples(reference, "tiny_likely"), strict=True):
        assert record["choice_logprobs"] == pytest.approx([sample["filtered_resps"][0][0]], abs=1e-3)


def test_exact_match_can_be_one(folder, config, model, reference, tmp_path):
    """A free answer is scored as cut: the model's own answer, made the right one."""
    made = task(folder, "tiny_free", shots=1)
    (context,) = some(model, made, 1)
    said = samples(reference, "tiny_free")[0]["filtered_resps"][0]
    loaded, _ = made._document(context.examples[0])
    assert made._metrics(loaded, document(0) | {"answer": said}, [said]) == {"exact_match,none": 1.0}
    assert made._metrics(loaded, document(0) | {"answer": said}, [said + "?"]) == {"exact_match,none": 0.0}
    assert made.score(context.examples[0], "it 0e and what follows") == 1
    assert made.score(context.examples[0], "it 0, and what follows") == 0


# -- compressed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["streamingllm", "specpc"])  # specpc reads in its own way
def test_a_compressed_context_is_what_is_measured(folder, reference, method):
    lm = kvbench_model(folder, method=method, budget=0.2)
    found = stock(folder, lm, ["tiny_free", "tiny_choice"], num_fewshot=1)
    about = found["config"]["kvbench"]
    assert 0 < about["bytes_held"] <= 0.2 * about["bytes_full"]
    assert about["contexts"] == 2 * NUMBER  # the three choices of a question share theirs
    for name in ("tiny_free", "tiny_choice"):
        pairs = list(zip(samples(found, name), samples(reference, name), strict=True))
        assert any(mine["filtered_resps"] != theirs["filtered_resps"] for mine, theirs in pairs)


def test_our_model_and_our_loop_agree_when_compressed(folder, config, tmp_path):
    """Under `aware` both compress a prompt but for its last token."""
    made = task(folder, "tiny_choice", shots=1)
    cell = Cell(config, plugins.build_method("snapkv", window=8), Budget.parse("0.3"), made, protocol="aware")
    loop.run_cells([cell], Settings(tmp_path))
    lm = kvbench_model(folder, method="snapkv", budget=0.3, **{"method.window": 8})
    found = samples(stock(folder, lm, ["tiny_choice"], num_fewshot=1), "tiny_choice")
    for record, sample in zip(read_cell(cell.folder(tmp_path))[1], found, strict=True):
        assert record["choice_logprobs"] == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=1e-3)


def test_cells_in_company_score_what_one_of_them_has_drawn(folder, config, tmp_path):
    made = [task(folder, "tiny_choice", shots=1) for _ in range(2)]
    methods = (plugins.build_method("full"), plugins.build_method("streamingllm"))
    cells = [Cell(config, method, Budget.parse("0.2"), own) for method, own in zip(methods, made, strict=True)]
    loop.run_cells(cells, Settings(tmp_path, 2))
    loop.run_cells(cells, Settings(tmp_path))  # goes on
    alone = records(task(folder, "tiny_choice", shots=1), config, tmp_path / "alone", "streamingllm", "0.2")
    found = read_cell(cells[1].folder(tmp_path))[1]
    assert [record["choice_logprobs"] for record in found] == [record["choice_logprobs"] for record in alone]


def test_a_choice_without_context_is_weighed_exactly(folder, own_model):
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, ("", continuation), 0) for continuation in ("a mat", "what is this")]
    mine = kvbench_model(folder, method="streamingllm", budget=0.2).loglikelihood(asked, disable_tqdm=True)
    for (value, _), (expected, _) in zip(mine, own_model.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert value == pytest.approx(expected, abs=1e-3)


def test_a_long_prompt_loses_its_beginning_as_in_lm_eval(folder, own_model):
    from lm_eval.api.instance import Instance

    prompt = " ".join(document(i)["passage"] for i in range(1, 90))
    options = {"until": [], "max_gen_toks": 20}
    mine, theirs = kvbench_model(folder), own_model
    assert len(mine.tok_encode(prompt)) > mine.max_length
    for ask, args in (("generate_until", (prompt, options)), ("loglikelihood", (prompt, " it is"))):
        found, expected = (getattr(lm, ask)([Instance(ask, {}, args, 0)]) for lm in (mine, theirs))
        assert found == expected if ask == "generate_until" else found[0][0] == pytest.approx(expected[0][0], abs=1e-3)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_the_last_line_is_asked_after_compression(folder, model):
    made = task(folder, "tiny_free", shots=1)
    (context,) = some(model, made, 1)
    before, after = text(model, context)
    assert after == "Answer:"
    assert before.endswith("Question: what is 0?\n")
    assert before.count("Question: ") == 2
    assert text(model, context, "aware") == (before + "Answer", ":")
    (context,) = some(model, task(folder, "tiny_free", shots=1, question="question"), 1)
    assert text(model, context)[1] == "Question: what is 0?\nAnswer:"
    assert "".join(text(model, context)) == before + after


def test_the_answer_prefix_is_the_tail(folder, model):
    (context,) = some(model, task(folder, "tiny_prefix"), 1)
    assert text(model, context)[1] == "Answer: It is"
    assert text(model, context, "aware")[1] == " It is"
    assert context.examples[0].target == " it 0"


def test_a_chat_is_the_models_own_template(folder, model, tiny):
    (context,) = some(tiny, task(folder, "tiny_free", chat=True), 1)
    prompt = tiny.writer.prompt(context.ids, context.examples[0].question, chat=context.chat)
    whole = tiny.writer.tokenizer.decode(prompt.context + prompt.question + prompt.tail)
    assert whole == f"<s><u>{document(0)['passage']}\nQuestion: what is 0?\nAnswer:</u><a>"


def test_one_line_is_all_context(folder, model):
    (context,) = some(model, task(folder, "tiny_likely"), 1)
    before, after = text(model, context)
    assert before + after == document(0)["passage"]
    assert len(after) == 1
    assert context.examples[0].choices == (" it 0",)  # the blank was at the end of the prompt


def test_a_prompt_is_cut_on_request(folder, model):
    (context,) = some(model, task(folder, "tiny_free", context=60), 1)
    before, after = text(model, context)
    assert len(before + after) == 60
    assert after == "Answer:"
    with pytest.raises(UsageError, match="no context"):
        some(model, task(folder, "tiny_free", context=6))


def test_examples_are_stable(folder, model):
    made = task(folder, "tiny_choice", shots=2)
    first, again = some(model, made, NUMBER), some(model, task(folder, "tiny_choice", shots=2), 2)
    assert first[:2] == again
    assert [context.id for context in first] == [f"tiny_choice-0-{i:06d}" for i in range(NUMBER)]
    assert len({context.cluster_id for context in first}) == len({document(i)["passage"] for i in range(NUMBER)})
    digest = made.data_hash()
    other = some(model, made, NUMBER, seed=1)
    assert any(a.ids != b.ids for a, b in zip(first, other, strict=True))
    assert made.data_hash() == digest
    assert first[2].examples[0].target == " nothing"


def test_a_cell_is_named_after_both(folder, config):
    """lm-eval has tasks with the names of ours."""
    cell = Cell(config, plugins.build_method("full"), Budget.parse("1"), task(folder, "niah"))
    assert cell.identity()["task"]["name"] == "lm_eval:niah"
    assert cell.folder(Path("results")).parts[1] == "lm_eval_niah"


def test_filters_and_metrics_by_name(folder, model):
    for metric, answer, score in (
        ("", "is 0", 1),
        ("exact_match,flexible", "was 0", 1),
        ("exact_match,strict", "0", 0),
    ):
        made = task(folder, "tiny_filters", metric=metric)
        (context,) = some(model, made, 1)
        assert context.examples[0].info["metric"] == (metric or "exact_match,strict")
        assert made.score(context.examples[0], answer) == score
    with pytest.raises(UsageError, match="it has exact_match,strict, exact_match,flexible"):
        some(model, task(folder, "tiny_filters", metric="bleu"))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("tiny_rolling", {}, "perplexity of a whole text"),
        ("tiny_sampled", {}, "samples its answers"),
        ("tiny_inputs", {}, "compares contexts"),
        ("tiny_empty", {}, "no context"),
        ("tiny_group", {}, "is a group"),
        ("tiny_prefix", {"shots": 2}, "leave task.shots out"),
        ("tiny_free", {"question": "title"}, "the document has passage, question"),
        ("tiny_free", {"question": "choices"}, "does not contain"),
    ],
    ids=str,
)
def test_what_cannot_run_says_so(folder, model, name, options, reason):
    with pytest.raises(UsageError, match=reason):
        some(model, task(folder, name, **options))


def test_impossible_options(folder, model, tmp_path):
    with pytest.raises(UsageError, match="below 0"):
        LMEval(name="x", shots=-1)
    with pytest.raises(UsageError, match="say which task"):
        some(model, LMEval())
    with pytest.raises(UsageError, match="no folder"):
        some(model, LMEval(name="x", include=str(tmp_path / "nowhere")))
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    with pytest.raises(UsageError, match="virtual environment"):
        some(model, LMEval(name="x", include=str(tmp_path)))


def test_without_lm_eval_the_way_to_it_is_told(folder, model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        some(model, task(folder, "tiny_free"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "nope"}, "unknown method 'nope'"),
        ({"method.windw": 1}, "method.windw"),
        ({"windw": 1}, "unknown model argument 'windw'"),
        ({"batch_size": 8}, "one at a time"),
        ({"budget": 0}, "not above zero"),
    ],
    ids=str,
)
def test_wrong_model_arguments(folder, options, reason):
    from kvbench.run import BAD_INPUT

    with pytest.raises(BAD_INPUT, match=reason):
        kvbench_model(folder, **options)


def test_perplexity_and_sampling_are_refused(folder):
    from lm_eval.api.instance import Instance

    lm = kvbench_model(folder)
    with pytest.raises(UsageError, match="task=lm"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("text",), 0)])
    with pytest.raises(UsageError, match="greedily"):
        lm.generate_until([Instance("generate_until", {}, ("text", {"do_sample": True, "temperature": 1.0}), 0)])


def test_the_command_line_is_lm_evals_with_one_model_more(folder, tmp_path, monkeypatch, capsys):
    import lm_eval.tasks

    from kvbench.lm_eval_model import main

    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the 14,000 others take seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    settings = f"method=streamingllm,budget=0.3,model.path={folder / 'model'},model.name=tiny,model.dtype=float32"
    line = f"lm_eval --model kvbench --model_args {settings} --include_path {folder / 'tasks'} --tasks tiny_choice"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--limit", "2", "--output_path", str(tmp_path)])
    assert main() == 0
    assert "tiny_choice" in capsys.readouterr().out
    (file,) = tmp_path.rglob("results_*.json")
    about = json.loads(file.read_text())["config"]["kvbench"]
    assert about["method"] == {"name": "streamingllm"}
    assert about["contexts"] == 2
    monkeypatch.setattr(sys, "argv", line.replace("streamingllm", "nope").split())
    assert main() == 2
    assert capsys.readouterr().err.startswith("kvbench: unknown method 'nope'")
