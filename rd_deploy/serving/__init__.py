"""What other people's servers need to serve an exported network."""
