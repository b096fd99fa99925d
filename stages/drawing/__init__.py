"""Drawings of recipes: an example of every task through the real planner (`example`), as SVG (`svg`, `figure`)."""
