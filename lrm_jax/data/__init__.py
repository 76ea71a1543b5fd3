"""Preference pairs: sources, aspect-ratio buckets, batches."""
