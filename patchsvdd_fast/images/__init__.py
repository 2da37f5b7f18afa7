"""Images: reading, light and mean, drift statistics, stored pictures, synthetic defects."""
