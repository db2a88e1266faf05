"""The protocol between actor ranks and engine workers: messages, state machine, server, client. No torch, no vLLM, no Megatron."""
