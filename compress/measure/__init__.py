"""Measuring what a rewrite did: layers, accuracy, cost, speed."""
