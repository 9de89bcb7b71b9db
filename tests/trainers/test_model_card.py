"""The card that is saved and pushed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from cbd_trl.cache import write_cache
from cbd_trl.trainers.model_card import describe_results
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import make_config, make_trainer, text_rows


def test_the_card_that_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        uploaded = ""

        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, *, folder_path: str, **kwargs: Any) -> None:
            Hub.uploaded = Path(folder_path, "README.md").read_text()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make_trainer(
        output_dir=str(tmp_path / "small"), hub_model_id="someone/small", divergence="jsd", beta=0.3,
        hidden_weight=1.0, kd_schedule="linear", max_steps=2,
        eval_dataset={"news": text_rows(), "code": text_rows(seed=2)},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(dataset_name="org/rows")
    card, history = ModelCard(Hub.uploaded), trainer.state.log_history
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "model_name": "small",
        "datasets": ["org/rows"], "tags": ["cbd_trl", "distillation", "generated_from_trainer", "trl", "distill"],
    }  # fmt: skip
    for part in (
        "| student | a model made in memory (LlamaForCausalLM, ",
        "| teacher | a model made in memory (LlamaForCausalLM, ",
        "| data | `org/rows` |",
        "| loss | 1 to 0 (linear) x jsd (temperature 1, beta 0.3) + 0.5 x cross-entropy + 1 x mean cosine distance",
        "| tokens seen | 66 |",
        'model="someone/small"',
        "| per token | training, step 2 | eval_news, step 2 | eval_code, step 2 |",
    ):
        assert part in card.content, part
    last, news, code = (next(e for e in reversed(history) if k in e) for k in ("loss", "eval_news_ce", "eval_code_ce"))
    row = f"| cross-entropy (nats) | {last['ce']:.4g} | {news['eval_news_ce']:.4g} | {code['eval_code_ce']:.4g} |"
    assert row in card.content
    assert str(tmp_path) not in card.content


def test_a_card_tells_the_losses_of_the_model_that_is_kept(tmp_path: Path) -> None:
    history = [{"loss": 3.0, "step": 1}, {"eval_loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}, {"train_loss": 2.0}]
    assert "| loss | 3 | 2 |" in describe_results(history, last_step=1)
    assert "| loss | 1 | 2 |" in describe_results(history)
    assert describe_results([]) == ""
    trainer = make_trainer(output_dir=str(tmp_path))
    trainer.create_model_card()
    assert "| data | not named |" in (tmp_path / "README.md").read_text()


def test_the_card_names_what_a_cached_teacher_left(tmp_path: Path) -> None:
    how = {"args": make_config(), "processing_class": tiny_tokenizer(), "k": 4}
    for kind, held in (("top_k", "top 4 and tail"), ("sampled", "4 draws")):
        write_cache(tiny_model("llama", seed=2), text_rows(), tmp_path / kind, kind=kind, **how)
        trainer = make_trainer(teacher_cache=str(tmp_path / kind), output_dir=str(tmp_path / "run"))
        trainer.create_model_card()
        card = (tmp_path / "run" / "README.md").read_text()
        assert f"| teacher | a model made in memory, from a cache ({held}) |" in card
