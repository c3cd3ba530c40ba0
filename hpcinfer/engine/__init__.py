"""Requests in, sequences through the model, completions out: the loop of one replica."""
