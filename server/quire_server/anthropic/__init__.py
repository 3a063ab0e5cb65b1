"""Anthropic's Messages API, in front of what chat does."""
