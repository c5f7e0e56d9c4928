"""Tokens on disk: collecting rollouts, scoring them, reading them."""
