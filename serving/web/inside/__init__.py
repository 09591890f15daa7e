"""Pages that look inside a model, beside the chat: one module for each; what is computed stands in `evaluation/`."""
