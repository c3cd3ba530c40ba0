"""Rows in, records out: formats, tokenizer, chat template, incremental text."""
