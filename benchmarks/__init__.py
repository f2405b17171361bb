"""What is compared: commands that measure."""
