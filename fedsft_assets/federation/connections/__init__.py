"""How the processes of a federation reach each other, and that nobody else does."""
