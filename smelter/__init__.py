"""Smelter trains ternary (BitNet b1.58) code models and hands them to the tools people use."""

__version__ = "0.1.0"
