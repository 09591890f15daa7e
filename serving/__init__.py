"""How a model is used."""
