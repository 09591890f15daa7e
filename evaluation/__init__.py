"""Evaluate models: benchmarks, verifiers, judges, tools, a look inside; imports inference and the packages below it."""
