"""Octavo: an elastic, fault-tolerant serving cluster for Mixture-of-Experts language models on Ray."""

__version__ = "0.1.0"
