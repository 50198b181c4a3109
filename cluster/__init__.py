"""What a cluster needs; its files come with the first cluster that is run."""
