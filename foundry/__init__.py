"""Foundry makes training data: code from this machine and from teacher models, as JSONL records."""

__version__ = "0.1.0"
