"""Evaluate models: C-Eval and scores of given answers; imports inference and the rooms below it."""
