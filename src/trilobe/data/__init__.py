"""Lobe 1, data: which question to ask next, who answered it and how well, what the answers amount to."""
