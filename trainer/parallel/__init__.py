"""Parallel strategies: data parallelism, FSDP and ZeRO behind one interface; imported by the training loop only."""
