"""Whose teacher it is: provenance, checks of stored scores against the models they claim to come from."""
