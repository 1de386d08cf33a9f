"""Evaluation: metrics, their intervals, and how far outputs differ."""
