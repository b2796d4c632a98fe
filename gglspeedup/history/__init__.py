"""Histories of node embeddings: stores, tables, files."""
