"""Fuzzers, each with a property; run by hand for minutes, and for a moment by the test-suite."""
