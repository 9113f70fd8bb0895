"""Vocabularies: telling them apart."""
