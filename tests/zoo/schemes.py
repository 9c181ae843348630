"""Model types by positional scheme, for schemes other than rotary frequencies.

Read from the modeling files of transformers 5.24 by hand, so that what `hf_posext` detects is compared with something
that it did not compute itself.
"""

_OTHER_SCHEMES = {
    "learned": (
        "bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small camembert "
        "data2vec-text electra ernie git gpt-sw3 gpt2 gpt_bigcode gpt_neo mbart megatron-bert mvp openai-gpt opt "
        "plbart prophetnet reformer rembert roberta roberta-prelayernorm roc_bert trocr whisper xlm xlm-roberta "
        "xlm-roberta-xl xmod"
    ),
    "alibi": "bloom mpt",
    "sinusoidal": "ctrl marian musicgen musicgen_melody pegasus xglm",
    "relative": "cpmant inkling_text inkling2_text inkling2_loop_text xlnet",
    "none": "falcon_mamba jamba kimi_linear mamba mamba2 nemotron_h rwkv xlstm zamba",
    "rotary table": "codegen gptj roformer",  # rotated by a table of sines, without a vector of frequencies
}

OTHER_SCHEMES = {model_type: scheme for scheme, types in _OTHER_SCHEMES.items() for model_type in types.split()}

NOT_BUILT = {
    "blt": "its own forward with a cache needs a field that its config lacks",
    "dots3_note": "its audio and vision towers cannot be made small; dots3_note_text is the same decoder",
    "gemma3n": "needs the timm library; gemma3n_text is the same decoder",
    "gemma4_assistant": "reads the KV cache of another model, cannot run alone",
    "gemma4_unified_assistant": "reads the KV cache of another model, cannot run alone",
}
"""Causal-LM types of which the zoo builds no model, with the reason."""

ENCODERS = {
    **dict.fromkeys(
        "albert bert camembert distilbert electra longformer roberta xlm-roberta".split(),
        "learned",
    ),
    "mpnet": "learned and relative",
    "deberta": "learned and relative",
    "deberta-v2": "learned and relative",
    **dict.fromkeys("eurobert modernbert nomic_bert".split(), "rotary"),
    "roformer": "rotary table",
}
"""Encoders with a masked-LM head: `build(model_type, task="masked-lm")`."""

SEQ2SEQ = {
    **dict.fromkeys("bart blenderbot led mbart".split(), "learned"),
    **dict.fromkeys("m2m_100 marian pegasus".split(), "sinusoidal"),
    **dict.fromkeys("longt5 mt5 switch_transformers t5 umt5".split(), "relative"),
    "t5gemma": "rotary",
}
"""Encoder-decoder models: `build(model_type, task="seq2seq-lm")`."""
