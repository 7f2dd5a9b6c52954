"""The plan of an image's pastes, on the CPU: walls, places, what each shows and how it looks."""
