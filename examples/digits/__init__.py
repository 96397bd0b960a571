"""Handwritten digits, trained with torch's Adam and ours from one seed."""
