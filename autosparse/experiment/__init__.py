"""Grids of runs, their statistics, the report and the tracking."""
