"""One option for every matrix, from a measurement alone: no model is read, nothing heavy is loaded."""
