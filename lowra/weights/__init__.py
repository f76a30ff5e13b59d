"""What a packed weight is: its tensors, the tables it is made from, its groups, and how one is told from another."""
