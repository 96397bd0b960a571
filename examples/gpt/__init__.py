"""A small GPT, trained by torch's AdamW and by ours in each memory mode, from one seed."""
