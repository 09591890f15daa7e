"""Models for other libraries: Hugging Face, GGUF, self-check, model card; imports model and common."""
