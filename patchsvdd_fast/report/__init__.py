"""What is made of scores: tables, maps, heat maps, an HTML page."""
