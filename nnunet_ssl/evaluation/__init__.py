"""Metrics, benchmark runner, comparison and report."""
