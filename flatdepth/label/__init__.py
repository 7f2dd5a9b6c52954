"""The marker: outlines drawn on one's own photographs, with the planes that result from them."""
