"""What a model will take, from config.json alone: bytes of its files, memory to run it, time to make it."""
