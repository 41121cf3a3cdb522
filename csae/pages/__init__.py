"""Pages to read a text with: what is on one, and how it is written."""
