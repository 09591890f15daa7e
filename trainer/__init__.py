"""How a MiniMind is trained: data, packing, loss, optimizer, the loop, checkpoints."""
