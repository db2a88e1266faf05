"""Ways to move bytes from an actor rank to an engine worker: one file each, with both ends in it. Knows no Megatron and no vLLM."""
