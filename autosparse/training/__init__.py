"""Data, models and the one training loop."""
