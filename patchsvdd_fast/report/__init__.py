"""Outputs made from scores: tables, map files, heat maps, an HTML report."""
