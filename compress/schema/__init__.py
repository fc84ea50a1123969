"""Recipes as data: layers of YAML, places of errors, sections."""
