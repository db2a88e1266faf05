"""The typed channel between actor ranks and engine workers. Pure Python: no torch, no vLLM, no Megatron."""
