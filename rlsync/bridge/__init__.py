"""Between Hugging Face's names and a Megatron actor: AutoBridge, checkpoints, and what can be a source of a sync. Knows no engine."""
