"""Reports on a curation: measures of balance, plots, and an HTML page."""
