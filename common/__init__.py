"""Errors, command line, atomic files and locks, progress; imports no other package, and never torch."""
