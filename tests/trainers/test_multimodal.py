"""A multimodal checkpoint, by name or in memory, is taken for the text it writes: what its language model would do."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel, ProcessorMixin

from cbd_trl import DistillTrainer, build_chain, from_chain
from cbd_trl.architectures import decoder_layers
from cbd_trl.utils.modeling import text_model
from cbd_trl.utils.tokenizers import text_tokenizer
from tests.tiny import randomize, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.trainers.bridge_runs import make_bridge, students_tokenizer, teachers_tokenizer
from tests.training import assert_same_gradient, make_config, make_trainer, one_step, text_rows

_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def tiny_multimodal(*, seed: int = 0, layers: int = 4, **text: Any) -> PreTrainedModel:
    """A Gemma 3 with a tower for images; both of four layers, the text of width 32, 64 vocabulary rows, tied."""
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 5}
    fields |= {"max_position_embeddings": 64, "sliding_window": 6, "eos_token_id": 2, "pad_token_id": 0, **text}
    config = Gemma3Config(
        text_config=fields,
        vision_config={**_VISION, "num_hidden_layers": 4},
        mm_tokens_per_image=4,
        image_token_index=fields["vocab_size"] - 1,
    )
    model = Gemma3ForConditionalGeneration(config)
    randomize(model.model.language_model, seed)
    return model.eval()


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """A text model of the same weights, with memory of its own."""
    text: Any = type(text_model(model))(text_model(model).config)
    text.load_state_dict(text_model(model).state_dict())
    return text.eval()


class Processor(ProcessorMixin):
    """A processor without what it does with images."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template


def saved(model: Any, tokenizer: Any, folder: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def text_gradients(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("language_model.", ""): gradient for name, gradient in gradients.items()}


def assert_same_step(ours: Any, theirs: Any) -> None:
    (logs, gradients), (text_logs, wanted) = one_step(ours), one_step(theirs)
    for term in {"loss", "kd", "hidden", "teacher_ce", "num_tokens"} & text_logs.keys():
        assert logs[term] == pytest.approx(text_logs[term], rel=1e-5), term
    assert_same_gradient(text_gradients(gradients), wanted)


@pytest.mark.parametrize("packing", [False, True])
def test_by_name_as_student_and_teacher_it_trains_as_its_language_model(tmp_path, packing) -> None:
    student, teacher = tiny_multimodal(seed=1, layers=2), tiny_multimodal(seed=2)
    options = {"hidden_weight": 1.0, "packing": packing}
    ours = DistillTrainer(
        saved(student, tiny_tokenizer(), tmp_path / "student"),
        saved(teacher, tiny_tokenizer(), tmp_path / "teacher"),
        make_config(**options),
        train_dataset=text_rows(),
    )
    assert type(ours.model).__name__ == "Gemma3ForConditionalGeneration" and ours.args.model_init_kwargs is None
    assert ours.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    theirs = make_trainer(student=language_model(student), teacher=language_model(teacher), **options)
    assert_same_step(ours, theirs)


def test_the_layers_are_those_of_the_language_model() -> None:
    model = tiny_multimodal()
    assert len(model.model.vision_tower.encoder.layers) == 4
    assert decoder_layers(model) is model.model.language_model.layers


def test_with_a_processor_and_an_adapter_beside_a_text_model() -> None:
    processor = Processor(tiny_tokenizer())
    trainer = make_trainer(
        student=tiny_multimodal(layers=2),
        teacher=tiny_model("gemma3_text", seed=2),
        processing_class=processor,
        peft_config=LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"),
        hidden_weight=1.0,
        swap_probability=0.0,
    )
    logs, gradients = one_step(trainer)
    assert trainer.processing_class is processor.tokenizer and logs["kd"] > 0 and len(gradients) == 4


def test_a_processors_template_is_taken_where_the_tokenizer_has_none() -> None:
    tokenizer = tiny_tokenizer()
    assert text_tokenizer(Processor(tokenizer, "other")) is tokenizer
    tokenizer.chat_template = None
    found = text_tokenizer(Processor(tokenizer, "its own"))
    assert (found.chat_template, tokenizer.chat_template) == ("its own", None)
    with pytest.raises(TypeError, match=r"The processing class is a Processor, which has no tokenizer"):
        text_tokenizer(Processor(None))


@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_across_tokenizers_it_trains_as_its_language_model(tmp_path, role) -> None:
    rows, tokenizer = (300, students_tokenizer()) if role == "model" else (420, teachers_tokenizer())
    whole = tiny_multimodal(seed=3, vocab_size=rows, max_position_embeddings=128)
    place = saved(whole, tokenizer, tmp_path / "whole")
    own = {"processing_class": None} if role == "model" else {"teacher_processing_class": Processor(tokenizer)}
    options = {"objective": "alm", "hidden_weight": 0.0}
    ours = make_bridge(**{role: place}, **own, **options)
    assert_same_step(ours, make_bridge(**{role: language_model(whole)}, **options))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_chain_is_made_of_its_language_model(tmp_path, in_memory, caplog) -> None:
    whole = tiny_multimodal()
    place = saved(whole, tiny_tokenizer(), tmp_path / "whole")
    chain = build_chain(
        whole if in_memory else place,
        [{"num_hidden_layers": 2}],
        dataset=text_rows(),
        output_dir=tmp_path / "chain",
        args=make_config(save_strategy="no"),
        processing_class=tiny_tokenizer() if in_memory else None,
        calibration_tokens=64,
    )
    model = from_chain(chain, num_parameters=chain.anchors[0].num_parameters)
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.config.tie_word_embeddings
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = whole(ids).logits
        assert (model(ids).logits - wanted).abs().max() <= 1e-5 * wanted.std()
