"""Hostile files beside a good chain.json, and why each is refused. A new case: one line."""

from tests.hostile.damages import (
    DEEP,
    OUTSIDE,
    Case,
    fields,
    link,
    link_of_folder,
    link_of_manifest,
    pipe,
    planted,
    unlisted,
)

CODE = r"names code \("
PICKLES = (
    "pytorch_model.bin", "model.pt", "model.pth", "statistics.pkl", "model.npz", "a.joblib", "modeling_x.py", "x.so",
    "x.gguf",
)  # fmt: skip

FOLDERS = [
    # Links and what is no file.
    Case(
        "link-out",
        link("tokenizer.json", f"../../{OUTSIDE}/large/tokenizer.json", f"{OUTSIDE}/large/tokenizer.json"),
        "is a link that leaves",
    ),
    Case(
        "link-to-weights",
        link("model.safetensors", f"../../{OUTSIDE}/large/model.safetensors"),
        "is a link that leaves",
    ),
    Case("link-to-root", link("config.json", "/etc/passwd"), "is a link that leaves"),
    Case("link-to-device", link("config.json", "/dev/zero"), "is a link that leaves"),
    Case("link-loop", link("config.json", "config.json"), "leads nowhere|is missing|is a link"),
    Case("link-of-folder", link_of_folder, "is a link that leaves"),
    Case("link-of-manifest", link_of_manifest, "is a link that leaves"),
    Case(
        "unlisted-link", link("generation_config.json", f"../../{OUTSIDE}/large/config.json"), "is a link that leaves"
    ),
    Case("pipe-manifest", pipe("chain.json"), "it must be a plain file"),
    Case("pipe-config", pipe("large/config.json"), "is missing, but"),
    Case("pipe-weights", pipe("large/model.safetensors"), "is missing, but"),
    # Code.
    Case("auto-map", fields("config.json", auto_map={"AutoModelForCausalLM": "evil/repo--modeling.Model"}), CODE),
    Case("auto-map-inside", fields("config.json", text_config={"auto_map": {"AutoConfig": "configuration.C"}}), CODE),
    Case("auto-map-in-list", fields("config.json", sub_configs=[{"auto_map": {"AutoConfig": "x.C"}}]), CODE),
    Case("kernel", fields("config.json", _attn_implementation="evil/kernel"), CODE),
    Case("kernel-open", fields("config.json", attn_implementation="evil/kernel"), CODE),
    Case("experts", fields("config.json", _experts_implementation="evil/kernel"), CODE),
    Case("tokenizer-code", fields("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}), CODE),
    Case("generation-code", fields("generation_config.json", auto_map={"x": "y.Z"}), CODE),
    Case("generation-custom", fields("generation_config.json", custom_generate="evil/repo"), CODE),
    Case("other-config", fields("config.json", configuration_files=["config.4.0.0.json"]), "names another file"),
    Case(
        "other-tokenizer",
        fields("tokenizer_config.json", fast_tokenizer_files=[f"../../{OUTSIDE}/tokenizer.4.0.0.json"]),
        "names another file",
    ),
    Case(
        "tokenizer-elsewhere",
        fields("tokenizer_config.json", tokenizer_file=f"../../{OUTSIDE}/tokenizer.4.0.0.json"),
        "names another file",
    ),
    Case("vocabulary-elsewhere", fields("tokenizer_config.json", vocab_file="/etc/passwd"), "names another file"),
    Case(
        "special-tokens-elsewhere",
        fields("tokenizer_config.json", special_tokens_map_file="/x.json"),
        "names another file",
    ),
    Case("no-such-model", fields("config.json", model_type="../evil"), "cannot be read as a model config"),
    Case("quantized", fields("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "quantized"),
    Case("layers-claimed", fields("config.json", num_hidden_layers=10**9), "more than any model has"),
    Case("labels-claimed", fields("config.json", num_labels=10**9), "more than any model has"),
    Case("width-claimed", fields("config.json", hidden_size=2**62), "has the shape|cannot be read"),
    Case("vocabulary-claimed", fields("config.json", vocab_size=2**62), "has the shape|cannot be read"),
    Case("positions-claimed", fields("config.json", max_position_embeddings=2**80), "more than any model has"),
    Case("config-list", planted("config.json", b"[]"), "must hold a JSON object"),
    Case("config-nan", planted("config.json", b'{"rms_norm_eps": NaN}'), "is not finite"),
    Case("config-types", fields("config.json", hidden_size="32"), "cannot be read as"),
    Case("config-huge", planted("config.json", b" " * (2**24 + 1)), "bytes are more than the"),
    Case("tokenizer-deep", planted("tokenizer.json", DEEP), "nested too deeply"),
    Case("statistics-text", planted("statistics.safetensors", b"moments"), "cannot be read as a safetensors file"),
    # Files that nobody vouches for, and that transformers would read.
    Case("unlisted-template", unlisted("additional_chat_templates/x.jinja", b"{{ 1 }}"), "does not list"),
    Case("unlisted-tokens", unlisted("added_tokens.json"), "does not list"),
    Case("unlisted-adapter", unlisted("adapter_config.json"), "does not list"),
    Case("unlisted-vocabulary", unlisted("tokenizer.model", b"x"), "does not list"),
]
FOLDERS += [Case(f"pickle-{name}", planted(name), "nothing that a program could run") for name in PICKLES]
