"""The trainers, one folder each: a configuration and a subclass of a TRL trainer."""
