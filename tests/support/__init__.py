"""Builders of test input: tar bytes and images, written for the tests and used by nothing else."""
