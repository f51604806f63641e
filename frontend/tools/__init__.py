"""Tool calls and reasoning: what clients ask for, and how they are found in what models write."""
