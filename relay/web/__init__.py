"""HTTP in, verbs called, HTTP out."""
