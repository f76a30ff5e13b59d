"""lowra inside PEFT."""
