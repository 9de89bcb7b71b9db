"""Write the table of transformers' causal language models into docs/reference/families.md: supported, or why not.

    python docs/families.py

Fails where transformers has a family that is in no row below, and where a row names one that is supported.
"""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cbd_trl.architectures.registry import supported_model_types

PAGE = Path(__file__).parent / "reference" / "families.md"
BEGIN, END = "<!-- written by docs/families.py -->\n", "<!-- end -->\n"
# Of several reasons the one that would take most work. A family that is added leaves this table.
WHY_NOT = {
    "not described yet; nothing is known to stand in the way": """
        biogpt codegen cohere cohere_compass_text cwm falcon gemma glm glm4 gpt_bigcode gpt_neo
        gpt_neox_japanese gptj granite_swa hyperclovax internlm3 iquestcoder jais2 nemotron olmo vaultgemma
        """,
    "experts and routers of kinds that are not described": """
        afmoe aria_text axk1 axk2 beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1
        dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa
        granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 jetmoe kolibri1 laguna llama4 llama4_text
        lfm2_moe longcat_flash mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe
        solar_open zaya
        """,
    "layers of linear attention of kinds that are not described": """
        bailing_hybrid kimi_linear minimax olmo_hybrid
        qwen3_5_moe qwen3_5_moe_text qwen3_next qwen4_exp qwen4_exp_text
        """,
    "state-space or recurrent layers: groups, states and inner width are tied to each other": """
        bamba falcon_h1 falcon_mamba granitemoehybrid jamba mamba mamba2 nemotron_h recurrent_gemma rwkv xlstm zamba
        zamba2
        """,
    "layers of short convolutions of kinds that are not described": """
        inkling2_text inkling_text lfm3
        """,
    "keys and values are compressed (latent attention), with a norm inside": "minicpm3 youtu",
    "ALiBi: the slope of a head follows from its index, so heads cannot be sorted or dropped": "bloom mpt",
    "sinusoidal positions are added to the stream, and are no weights that a cut could change": "ctrl xglm",
    "layers read embeddings of their own, or keys and values of another layer": """
        gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text
        """,
    "norms sit on the stream: no layer can be added": "modernbert-decoder openai-gpt",
    "ternary weights, and norms inside attention and FFN": "bitnet",
    "each head is the difference of two attentions, whose weight depends on the depth": "diffllama",
    "the attention mask is computed from the values": "doge",
    "the same layers run several times in a loop": "hrm_text",
    "bytes in patches: three models in one": "blt",
    "LayerNorms over queries and keys": "persimmon",
    "positions and segments are learned biases of the attention scores": "cpmant",
    "a tokenizer alone: its checkpoints are of type gpt2, which is supported": "gpt-sw3",
    "hashed attention in reversible layers": "reformer",
    "predicts tokens in permuted order": "xlnet",
    "drafts for another model, whose hidden states it reads": "gemma4_assistant gemma4_unified_assistant",
    "an encoder, or half of an encoder-decoder, with a causal mask": """
        bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text
        electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm
        roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod
        """,
    "images or audio: of a model whose language model is a supported family that one is used": """
        emu3 fuyu gemma3 git got_ocr2 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal
        qwen3_5 trocr whisper
        """,
}


def families_table() -> str:
    """The rows: supported families first.

    Raises:
        ValueError: for a family of transformers that has no row, one in two rows, and a supported one that has a
            reason.
    """
    rows = {"supported": supported_model_types()} | {reason: names.split() for reason, names in WHY_NOT.items()}
    listed = [name for names in rows.values() for name in names]
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise ValueError(f"In two rows: {', '.join(twice)}. Take a supported family out of WHY_NOT in {__file__}.")
    if missing := sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - set(listed)):
        raise ValueError(
            f"transformers has families without a row: {', '.join(missing)}. Add each to a reason of WHY_NOT in "
            f'{__file__}, or support it (CONTRIBUTING.md, "Add a model family").'
        )
    lines = [f"| {reason} | {', '.join(sorted(names))} |\n" for reason, names in rows.items()]
    return "".join(["| supported, or why not | families |\n", "|---|---|\n", *lines])


def page_with_table(page: str) -> str:
    """The page with the table of today between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + families_table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
