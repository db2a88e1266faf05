"""Everything that imports Megatron-Core: parallel state, models, optimizer, training step, rank state.

Knows nothing of checkpoints' folders, HF names, engines or transports. Importing this package imports neither
Megatron nor torch.distributed; import the module you need.
"""
