"""Masks by training: each method in a file of its own."""
