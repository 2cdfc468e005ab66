"""What one forward pass reads: windows of tokens, and the corpora that fill them."""
