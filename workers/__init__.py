"""Deployable programs and worked examples; they use stent's public names only."""
