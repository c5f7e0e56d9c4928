"""
`trl-blend`: training, offline distillation, export and diagnosis from the command line.

What a user can get wrong is said in one line, with exit code 2; nothing heavy is imported before a command runs.
"""

from trl_blend.cli.program import main


__all__ = ["main"]
