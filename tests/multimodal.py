"""A tiny Gemma 3 with a tower for images, and the language model in it."""

from typing import Any

from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from cbd_trl.utils.modeling import text_model
from tests.tiny import randomize

_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def tiny_multimodal(*, seed: int = 0, layers: int = 4, **text: Any) -> PreTrainedModel:
    """Four layers, as many as its tower has, width 32, 64 vocabulary rows, tied; the same for the same seed."""
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
