"""What a MiniMind is: configuration, network, tokenizer, weights, decoding."""
