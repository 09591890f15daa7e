"""Errors, command line, atomic files and locks, progress; imports no other room, and never torch."""
