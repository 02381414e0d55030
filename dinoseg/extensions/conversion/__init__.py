"""Conversion of datasets into the formats of other tools."""
