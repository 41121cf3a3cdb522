"""Tiny causal language models with random weights, one for each architecture, made from their configs on the spot.

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_it(name: str) -> None:
        model = ARCHITECTURES[name]()

Each has N_LAYERS blocks, a residual stream of D_IN and VOCABULARY tokens, and takes at least 128 tokens at a time.
What the installed transformers does not have is in MISSING, with the reason. No special token is set but padding (0),
so that `generate` stops at the length that it is asked for, and weights are a few times as large as usual, so that
the layers matter to the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

D_IN, N_LAYERS, VOCABULARY = 32, 3, 320

_NAMES = {"vocab_size": VOCABULARY, "hidden_size": D_IN, "num_hidden_layers": N_LAYERS}
_HEADS = _NAMES | {"num_attention_heads": 4}
_MLP = _HEADS | {"intermediate_size": 48}
_GQA = _MLP | {"num_key_value_heads": 2}
_GEMMA = _GQA | {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_GPT = {"vocab_size": VOCABULARY, "n_embd": D_IN, "n_layer": N_LAYERS, "n_head": 4}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

# name: (class of the model, class of the config, sizes)
_CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GQA),
    "mistral-sliding-window": ("MistralForCausalLM", "MistralConfig", _GQA | {"sliding_window": 6}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _GQA | {"num_local_experts": 3}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GEMMA),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _GEMMA | _EXPERTS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA | {"sliding_window": 6, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA | {"sliding_window": 6}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT | {"n_positions": 256}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _MLP),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT | {"rotary_dim": 4, "n_positions": 256}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": D_IN, "num_layers": N_LAYERS, "num_heads": 4}
        | {"attention_types": [[["global", "local", "global"], 1]], "window_size": 6},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", _HEADS | {"ffn_dim": 48, "word_embed_proj_dim": D_IN}),
    "opt-narrow": ("OPTForCausalLM", "OPTConfig", _HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", _MLP),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GQA),
    "falcon": ("FalconForCausalLM", "FalconConfig", _HEADS),
    "bloom": ("BloomForCausalLM", "BloomConfig", _GPT | {"hidden_size": D_IN}),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": D_IN, "n_layers": N_LAYERS, "n_heads": 4, "max_seq_len": 256},
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _GQA),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GQA),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GQA | {"logit_scale": 0.25}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        _GQA | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", _GEMMA | {"num_local_experts": 4, "sliding_window": 6}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _MLP
        | _LATENT
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _GEMMA | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        _GEMMA | {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", _GQA | {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": ("MambaForCausalLM", "MambaConfig", _NAMES | {"state_size": 8}),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        _NAMES | {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon-mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", _NAMES | {"state_size": 8}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", _NAMES | {"attention_hidden_size": D_IN, "context_length": 256}),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        _GQA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "bamba": ("BambaForCausalLM", "BambaConfig", _GQA | _MAMBA2 | {"attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        _MLP
        | {"num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16}
        | {"mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4, "use_mamba_kernels": False}
        | {"layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1]},
    ),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        _GQA | {"lru_width": D_IN, "attention_window_size": 64, "block_types": ["recurrent", "attention", "recurrent"]},
    ),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        {"vocab_size": VOCABULARY, "d_model": D_IN, "num_layers": N_LAYERS, "attention_heads": 4, "ffn_dim": 48},
    ),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", _GPT | {"dff": 48}),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", _GPT | {"rotary_dim": 4, "n_positions": 256}),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", _MLP),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", _MLP),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        _GEMMA
        | _EXPERTS
        | {"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _GQA),
}


def _causal(model: str, config: str, sizes: dict[str, Any]) -> Any:
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return _made(getattr(transformers, model), getattr(transformers, config)(**sizes, **tokens))


def _gemma3_with_a_picture_tower() -> Any:
    text = _GEMMA | {"sliding_window": 6}
    pictures = {"hidden_size": D_IN, "intermediate_size": 48, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=pictures | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )
    return _made(transformers.Gemma3ForConditionalGeneration, config)


def _made(model_class: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name and "wte" not in name:
                parameter.data.mul_(3)
    generation = model.generation_config
    generation.bos_token_id = generation.eos_token_id = None
    generation.pad_token_id = 0
    return model


ARCHITECTURES: dict[str, Callable[[], Any]] = {}
MISSING: dict[str, str] = {}

_there = set(dir(transformers))  # which imports none of them
for _name, (_model, _config, _sizes) in _CAUSAL.items():
    if {_model, _config} <= _there:
        ARCHITECTURES[_name] = partial(_causal, _model, _config, _sizes)
    else:
        MISSING[_name] = f"transformers {transformers.__version__} has no {_model}"
if "Gemma3ForConditionalGeneration" in _there:
    ARCHITECTURES["gemma3-with-pictures"] = _gemma3_with_a_picture_tower
else:
    MISSING["gemma3-with-pictures"] = f"transformers {transformers.__version__} has no Gemma3ForConditionalGeneration"
if transformers.__version__.startswith("4."):
    del ARCHITECTURES["recurrent-gemma"]
    MISSING["recurrent-gemma"] = "that of transformers 4 keeps its states, and fails at a batch of another size"
