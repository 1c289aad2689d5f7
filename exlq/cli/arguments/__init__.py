"""The flags of the commands. Nothing heavy is loaded to say what they are."""
