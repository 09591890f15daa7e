"""How good a model is: C-Eval and scores of given answers; imports inference and the rooms below it."""
