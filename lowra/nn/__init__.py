"""What stands in the model: modules whose frozen weight lies in packed bits."""
