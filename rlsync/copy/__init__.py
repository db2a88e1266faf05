"""Runs strided copies between named buffers. Knows plans and tensors; knows no model, no engine, no process group."""
