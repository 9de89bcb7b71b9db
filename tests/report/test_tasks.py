"""Tasks of lm-eval from a file of one's own: the scores against scores computed here."""

import json
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl import Chain
from cbd_trl.report import tasks
from tests.report.conftest import QUICK, report_of, run

pytest.importorskip("lm_eval")

DOCS = [
    {
        "question": f"w{i} w{3 * i % 50}",
        "choices": [f"w{i + 9}", f"w{2 * i % 54} w{i + 4}", "w1 w2 w3"],
        "answer": i % 3,
    }
    for i in range(20)
]


def task_file(folder, name="colors", docs=DOCS, **fields):
    """Write a multiple-choice task and its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of task files; what lm-eval brings along takes seconds to read and is not looked at."""
    import lm_eval.tasks

    class OwnTasks(lm_eval.tasks.TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OwnTasks)
    folder = tmp_path / "tasks"
    folder.mkdir()
    return folder


def scores(anchor, docs):
    """Share of right answers: by log-likelihood, and by it for each letter of the answer."""
    tokenizer = AutoTokenizer.from_pretrained(anchor.path)
    model = AutoModelForCausalLM.from_pretrained(anchor.path, dtype=torch.float32)
    right, normalized = 0, 0
    for doc in docs:
        start = len(tokenizer(doc["question"])["input_ids"])
        likelihoods = []
        for choice in doc["choices"]:
            ids = torch.tensor([tokenizer(f"{doc['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits.log_softmax(-1)
            likelihoods.append(float(sum(log_probs[0, t - 1, ids[0, t]] for t in range(start, ids.shape[1]))))
        letters = [len(choice) for choice in doc["choices"]]
        per_letter = [value / length for value, length in zip(likelihoods, letters, strict=True)]
        right += max(range(3), key=likelihoods.__getitem__) == doc["answer"]
        normalized += max(range(3), key=per_letter.__getitem__) == doc["answer"]
    return right / len(docs), normalized / len(docs)


def test_scores_are_those_computed_here_in_the_json_and_on_the_page(word_chain, words, folder, tmp_path):
    task_file(folder)
    flags = ["--tasks", "colors", "--include_path", folder, "--operators", "nested,random", *QUICK]
    code, _, err = run(word_chain, "--data", words, "--output", tmp_path / "out", *flags)
    assert code == 0, err
    report = report_of(tmp_path / "out")
    assert report["tasks"] == ["colors"] and report["versions"]["lm-eval"]
    [chain] = report["chains"]
    for entry, anchor in zip(chain["anchors"], Chain.from_pretrained(word_chain).anchors, strict=True):
        right, normalized = scores(anchor, DOCS)
        score = entry["probes"]["colors"]
        assert (score["metric"], score["value"]) == ("acc_norm", pytest.approx(normalized))
        assert score["all"] == {"acc,none": pytest.approx(right), "acc_norm,none": pytest.approx(normalized)}
        assert score["examples"] == 20 and score["higher_is_better"] is True
        # The standard error of a mean of zeros and ones.
        assert score["stderr"] == pytest.approx((normalized * (1 - normalized) / 19) ** 0.5)
    assert all(target["probes"].keys() == {"nested", "random"} for target in chain["targets"])
    page = (tmp_path / "out" / "report.html").read_text()
    value, stderr = (
        chain["anchors"][0]["probes"]["colors"]["value"],
        chain["anchors"][0]["probes"]["colors"]["stderr"],
    )
    assert f"{value:.3f} ± {stderr:.3f}" in page and "Higher is better: acc_norm on 20 examples" in page


def test_a_task_more_or_other_examples_cost_only_themselves(word_chain, words, folder, tmp_path, monkeypatch):
    task_file(folder)
    task_file(folder, "shapes", DOCS[:6])
    asked = []
    original = tasks._measure

    def counted(name, *arguments):
        measure = original(name, *arguments)
        return lambda model: (asked.append(name), measure(model))[1]

    monkeypatch.setattr(tasks, "_measure", counted)
    flags = [word_chain, "--data", words, "--output", tmp_path / "out", "--include_path", folder, *QUICK]
    flags += ["--operators", "nested", "--sizes", Chain.from_pretrained(word_chain).anchors[0].num_parameters]
    assert run(*flags, "--tasks", "colors", "--limit", "5")[0] == 0
    models, asked[:] = len(asked), []
    assert models >= 3
    assert run(*flags, "--tasks", "colors,shapes", "--limit", "5")[0] == 0
    assert asked == ["shapes"] * models
    [chain] = report_of(tmp_path / "out")["chains"]
    probes = chain["anchors"][0]["probes"]
    assert {name: score["examples"] for name, score in probes.items()} == {"colors": 5, "shapes": 5}
    asked.clear()
    task_file(folder, "shapes", [{**doc, "answer": 0} for doc in DOCS[:6]])
    assert run(*flags, "--tasks", "shapes", "--limit", "5")[0] == 0
    assert asked == ["shapes"] * models


def test_a_group_with_a_score_of_its_own_counts_as_one(word_chain, words, folder, tmp_path):
    task_file(folder)
    task_file(folder, "shapes", DOCS[:10])
    group = {
        "group": "both",
        "task": ["colors", "shapes"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    flags = ["--include_path", folder, "--operators", "nested", *QUICK]
    code, _, err = run(word_chain, "--data", words, "--output", tmp_path / "out", "--tasks", "both", *flags)
    assert code == 0, err
    [chain] = report_of(tmp_path / "out")["chains"]
    right = [scores(Chain.from_pretrained(word_chain).anchors[0], docs)[0] for docs in (DOCS, DOCS[:10])]
    score = chain["anchors"][0]["probes"]["both"]
    assert score["value"] == pytest.approx((20 * right[0] + 10 * right[1]) / 30)
    assert score["metric"] == "acc" and score["examples"] == 30


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        ({}, ["--tasks", "colrs"], r"no task 'colrs'.*Did you mean 'colors'.*--include_path"),
        ({}, ["--tasks", "colors", "--include_path", "nowhere"], r"no folder nowhere of task files"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, [], r"colors could not be loaded.*gone\.jsonl"),
        ({"doc_to_text": "{{ nonsense"}, [], r"colors could not be loaded"),
        ({"test_split": "missing"}, [], r"colors could not be loaded"),
    ],
)
def test_what_cannot_be_had_is_said_before_any_model_is_measured(
    word_chain, words, folder, tmp_path, monkeypatch, fields, flags, message
):
    monkeypatch.setattr("cbd_trl.report.measure.sweep", lambda *args, **options: pytest.fail("measured"))
    task_file(folder, **fields)
    flags = ["--tasks", "colors", "--include_path", folder, *flags]
    code, _, err = run(word_chain, "--data", words, "--output", tmp_path / "out", *QUICK, *flags)
    assert code == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)
    assert not (tmp_path / "out").exists()


def test_without_lm_eval_the_way_out_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm-eval, which is not installed.*pip install 'cbd-trl\[eval\]'"):
        tasks.task_probes(["hellaswag"], tokenizer)
