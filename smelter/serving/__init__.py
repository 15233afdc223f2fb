"""The trained model behind HTTP: an engine that decodes many requests together, and the routes that lead to it."""
