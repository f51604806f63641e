"""Output that must have a form: what clients ask for, and the grammars that workers enforce."""
