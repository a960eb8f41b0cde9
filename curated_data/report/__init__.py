"""What a curation did: balance figures, plots, and one HTML page."""
