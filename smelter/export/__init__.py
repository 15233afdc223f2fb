"""The formats of others, and the proof that nothing changed on the way."""
