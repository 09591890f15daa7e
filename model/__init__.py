"""The model itself: configuration, network, weights, tokenizer and chat format; imports only common."""
