"""Helpers of the scripts, not needed to understand the method. Modules here import nothing from the level above."""
