"""Keys that a config.json of any model may hold: those of transformers' base class, of its older versions and of vLLM.

Rows for one family belong into its own table. What is refused here asks for another computation in transformers or in an engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlsync.models.keys import Key, harmless, only, read_elsewhere, unsupported
from rlsync.models.rope import ROPE_KEYS

# Of the weights as an actor holds them; more than these no optimizer of Megatron trains.
DTYPES = ("float32", "bfloat16", "float16")
_DTYPE = only(*DTYPES, *(f"torch.{name}" for name in DTYPES), default=None, is_nullable=True, why="weights of other dtypes are not trained")

_QUANTIZED = "quantised weights are neither loaded nor trained; use the checkpoint in bfloat16, and quantise in the engine"
_OTHER_MODEL = "another model lies inside this one; only plain text decoders are supported"
_OWN_CODE = "the model is computed by code in its folder, which is not known here; remove it where the folder holds a plain model"
# GenerationConfig._get_default_generation_params() of transformers, and keys of old files.
_GENERATION = (
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip

BASE_KEYS: Mapping[str, Key] = {
    **read_elsewhere("the choice of the family", "architectures", "model_type"),
    **read_elsewhere("rlsync.models.rope", *ROPE_KEYS),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "is_causal": only(True, default=True, is_nullable=True, why="attention to later tokens is not supported"),
    "use_bidirectional_attention": unsupported("attention to later tokens is not supported"),
    "is_encoder_decoder": unsupported("only decoders are supported"),
    "add_cross_attention": unsupported("only decoders are supported"),
    "per_layer_config": unsupported("layers of one kind only are supported"),
    "pruned_heads": unsupported("every layer needs all of its heads"),
    "quantization_config": unsupported(_QUANTIZED),
    "compression_config": unsupported(_QUANTIZED),
    "quantization": unsupported(_QUANTIZED),
    "quant_method": unsupported(_QUANTIZED),
    **dict.fromkeys(
        ("text_config", "vision_config", "audio_config", "speech_config", "thinker_config", "llm_config", "decoder", "generator"),
        unsupported(_OTHER_MODEL),
    ),
    "auto_map": Key(
        lambda value: isinstance(value, dict) and all(str(name) == "AutoTokenizer" for name in value),
        "absent, or name a tokenizer only",
        _OWN_CODE,
        is_nullable=True,
        is_honoured=False,
    ),
    "transformers_weights": unsupported("it names another file of weights; name that model.safetensors"),
    "fusion_config": unsupported("it makes transformers build other modules"),
    "distributed_config": unsupported("it makes transformers build other modules"),
    "attention_chunk_size": unsupported("attention within chunks is not supported"),
    "num_kv_shared_layers": unsupported("layers that share keys and values are not supported"),
    # Of vLLM, which builds its own model from the same file.
    "logit_scale": only(1, default=1, is_nullable=True, why="engines would scale their logits by it and the actor would not"),
    "bias": unsupported("engines would add a bias that the table of the family lacks"),
    "qkv_bias": unsupported("engines would add a bias that the table of the family lacks"),
    "qk_norm": unsupported("engines would normalise queries and keys and the actor would not"),
    "dual_chunk_attention_config": unsupported("attention within chunks is not supported"),
    "use_mrope": unsupported("positions of images are not supported"),
    "attn_type_list": unsupported("layers of one kind only are supported"),
    "block_configs": unsupported("layers of one kind only are supported"),
    "num_nextn_predict_layers": unsupported("layers that predict further tokens are not supported"),
    "position_embedding_type": only("rope", default="rope", is_nullable=True, why="no other kind of positions is known"),
    **harmless(
        "names what the file is and who wrote it",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "tokenizer_class",
        "finetuning_task",
        "prefix",
        "task_specific_params",
        "_attn_implementation_autoset",
        "unsloth_fixed",
        "unsloth_version",
    ),
    **harmless("of classifiers", "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout"),
    **harmless(
        "chooses what a call returns",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "use_return_dict",
        "tie_last_hidden_states",
        "torchscript",
    ),
    **harmless(
        "chooses how it is computed, not what",
        "use_cache",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "pretraining_tp",
        "use_bfloat16",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "is_decoder",
    ),
    **harmless("of weights at random; these are loaded", "initializer_range", "initializer_factor", "init_std"),
    **harmless(
        "token ids: read by tokenizers, rollouts and losses",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "cls_token_id",
        "mask_token_id",
        "unk_token_id",
        "decoder_start_token_id",
    ),
    **harmless("of generation in transformers; a run's sampling keys decide here", *_GENERATION),
}
