"""A mixed policy as a folder that transformers alone decodes."""
