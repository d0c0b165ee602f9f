"""How sure a difference of two losses is: numbers in, intervals and verdicts out, and nothing read or written."""
