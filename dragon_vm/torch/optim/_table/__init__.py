"""From a plan to device memory: chunks, rows, the table and its uploads."""
