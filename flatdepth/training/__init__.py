"""A run: the loop, what it optimises, what resuming needs, what it leaves behind, its memory."""
