"""Recipes, a file for each family."""
