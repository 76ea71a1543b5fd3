"""Alignment: objectives that turn rewards of samples into updates of a generator."""
