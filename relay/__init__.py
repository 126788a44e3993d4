"""Relay: a self-hosted webhook relay and notifier for AI generation jobs."""

__version__ = "0.1.0"
