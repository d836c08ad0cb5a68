"""`darkroom report`: a timeline of the last jobs, drawn from the ledger's records."""
